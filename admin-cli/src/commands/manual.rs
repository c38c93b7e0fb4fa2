//! `hsmctl man`: manual pages from the command line's own description, for the name the program was called by.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use clap_mangen::Man;

use crate::cli;
use crate::names::Name;
use crate::output::{self, note};

/// Arguments of `man`.
#[derive(Debug, Args)]
pub(crate) struct Manual {
    /// Write a page for each command into this folder, which is made if need be, instead of the main page to
    /// standard output.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(super) fn print(name: Name, args: &Manual) -> Result<()> {
    let described = cli::described(name);
    let Some(dir) = &args.dir else {
        let mut page = Vec::<u8>::new();
        Man::new(described.disable_help_subcommand(true))
            .render(&mut page)
            .context("write the manual page")?;
        return output::bytes(&page);
    };
    let shown = dir.display();
    std::fs::create_dir_all(dir).with_context(|| format!("{shown}: cannot be made"))?;
    clap_mangen::generate_to(described, dir).with_context(|| format!("{shown}: cannot be written"))?;
    note(&format!(
        "pages are in {shown}; read one with: man -l {shown}/{name}.1"
    ));
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_under_every_name() {
        for (name, pages) in [
            (Name::Hsmctl, "hsmctl.1 hsmctl-rotate.1 hsmctl-cluster-join.1"),
            (
                Name::HsmAdmin,
                "hsm-admin.1 hsm-admin-rotate.1 hsm-admin-cluster-join.1",
            ),
            (Name::CreateKek, "create-kek.1"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let args = Manual {
                dir: Some(dir.path().join("man1")),
            };
            print(name, &args).unwrap();
            for page in pages.split(' ') {
                let text = std::fs::read_to_string(dir.path().join("man1").join(page)).unwrap();
                assert!(text.contains(".SH OPTIONS"), "{page}: {text}");
            }
            let hidden = dir.path().join("man1").join(format!("{name}-dev-exec-node.1"));
            assert!(!hidden.exists());
        }
    }
}
