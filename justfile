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

# Faults on real processes, by a seed, and what the checkers say: --seconds N --seed S --nodes N
# --changing members|programs (docs/testing.md).
faults *ARGS:
    REGENT_TEST_FAULTS="{{ARGS}}" cargo test --locked --test faults long -- --ignored --nocapture

# Whole clusters on simulated machines, one for each seed: `just simulate --seeds 1000`, `just simulate --seed 17`.
simulate *ARGS:
    cargo run --release --locked -p regent-simulation --bin simulate -- {{ARGS}}

# Rules broken on purpose, which the simulation must find; some minutes.
simulate-faults:
    cargo test --release --locked -p regent-simulation --test faults -- --include-ignored --test-threads 1

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

# Decoders under libFuzzer, bounded: one target or all in turn (tests/fuzz/README.md).
fuzz TARGET="all" SECONDS="60":
    #!/usr/bin/env bash
    set -euo pipefail
    cargo run --quiet --locked -p regent-decoders --example seeds -- tests/fuzz/corpus
    targets={{TARGET}}
    [ "$targets" != all ] || targets=$(cargo +nightly fuzz list --fuzz-dir tests/fuzz)
    for target in $targets; do
        # No small input may allocate much or take long: 256 MiB at once is a fault, and so are 10 s for 64 KiB.
        cargo +nightly fuzz run --fuzz-dir tests/fuzz "$target" -- -max_total_time={{SECONDS}} \
            -max_len=65536 -timeout=10 -malloc_limit_mb=256 -print_final_stats=1
    done
