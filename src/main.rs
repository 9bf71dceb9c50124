//! The `regent` binary. Everything it does is in `regent-cli`.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    regent_cli::main()
}
