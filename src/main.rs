//! The `regent` binary. Everything it does is in `regent-cli`.

fn main() -> std::process::ExitCode {
    regent_cli::main()
}
