//! The `regent` binary. Everything it does is in `regent-cli`.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    regent_cli::main()
}
