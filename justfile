# The same as CI, without installing anything; changes nothing.
verify:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    cargo test --workspace --locked

# Mends what can be mended by a tool.
fix:
    cargo fmt --all
    cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged

# Elections under faults, the long way: twenty rounds of each, and what was measured.
elections ROUNDS="20":
    REGENT_ROUNDS={{ROUNDS}} cargo test --locked --test elections -- --nocapture

# Faults on real processes, by a seed, and what the checkers say: --seconds N --seed S --nodes N (docs/testing.md).
faults *ARGS:
    REGENT_TEST_FAULTS="{{ARGS}}" cargo test --locked --test faults long -- --ignored --nocapture

# etcd and Regent in turn on this machine: rates, latencies, CPU, and what became of each goal (benches/load/README.md).
bench-etcd *ARGS:
    cargo run --release --locked --manifest-path benches/load/Cargo.toml -- {{ARGS}}

# What single steps of a write cost: apply, encode and decode, the log stores.
bench-micro *ARGS:
    cargo bench --locked -p regent-micro {{ARGS}}

# A cluster to play with: three nodes and an agent.
dev *ARGS:
    cargo run --release -- dev {{ARGS}}

# Licences, sources and advisories of all dependencies (needs cargo-deny).
deny:
    cargo deny check
