//! The program `hsmctl`; see the library.

fn main() -> std::process::ExitCode {
    admin_cli::run()
}
