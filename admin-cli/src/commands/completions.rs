//! `hsmctl completions`: what a shell needs to complete the command line, for the name the program was called by.

use anyhow::Result;
use clap::Args;
use clap_complete::Shell;

use crate::cli;
use crate::names::Name;
use crate::output;

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell that shall complete.
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn print(name: Name, args: &Completions) -> Result<()> {
    output::bytes(&script(name, args.shell))
}

fn script(name: Name, shell: Shell) -> Vec<u8> {
    let mut script = Vec::<u8>::new();
    clap_complete::generate(shell, &mut cli::described(name), name.as_str(), &mut script);
    script
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_name_has_a_script_of_its_own_for_every_shell() {
        for &shell in Shell::value_variants() {
            for name in [Name::Hsmctl, Name::HsmAdmin, Name::CreateKek] {
                let script = String::from_utf8(script(name, shell)).unwrap();
                assert!(
                    script.contains(name.as_str()) && script.contains("idempotency-key"),
                    "{shell} {name}"
                );
            }
        }
    }

    #[test]
    fn a_shell_reads_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        for name in [Name::Hsmctl, Name::HsmAdmin, Name::CreateKek] {
            let path = dir.path().join(name.as_str());
            std::fs::write(&path, script(name, Shell::Bash)).unwrap();
            let checked = std::process::Command::new("bash")
                .arg("-n")
                .arg(&path)
                .output()
                .unwrap();
            assert!(
                checked.status.success(),
                "{name}: {}",
                String::from_utf8_lossy(&checked.stderr)
            );
        }
    }
}
