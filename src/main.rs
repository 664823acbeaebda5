//! The `scansentry` command.

fn main() -> std::process::ExitCode {
    scansentry::cli::main()
}
