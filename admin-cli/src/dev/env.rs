//! `DIR/env`: what a shell needs to talk to the playground, as exports that any POSIX shell reads, also under
//! `set -u`.

use std::path::Path;

use anyhow::{Context, Result};
use zeroize::Zeroizing;

use super::layout::{Facts, Layout, REPLICATION_ENV, SLOTS};
use crate::files;

/// Writes the file; the same secrets give the same file.
pub(crate) fn write(layout: &Layout, facts: Facts) -> Result<()> {
    let endpoints: Vec<String> = layout
        .nodes(facts)?
        .iter()
        .map(super::layout::Node::endpoint)
        .collect();
    let mut secrets = Vec::with_capacity(SLOTS.len() + 1);
    for slot in &SLOTS {
        secrets.push((slot.pin_env, files::read_secret(&layout.pin_file(slot.name))?));
    }
    secrets.push((
        REPLICATION_ENV,
        files::read_secret(&layout.replication_key_file())?,
    ));
    let text = render(&layout.env_file(), &endpoints, &layout.pki(), &secrets)?;
    files::write(&layout.env_file(), text.as_bytes())
}

fn render(
    file: &Path,
    endpoints: &[String],
    pki: &Path,
    secrets: &[(&str, Zeroizing<String>)],
) -> Result<Zeroizing<String>> {
    let text = |path: &Path| {
        path.to_str()
            .map(str::to_owned)
            .with_context(|| format!("{}: not UTF-8", path.display()))
    };
    // Reserved at once: a buffer that grows leaves copies behind.
    let mut out = Zeroizing::new(String::with_capacity(16 * 1024));
    out.push_str("# DEV playground of hsm-service. Holds secrets. Use it with: . ");
    // In a comment: a folder's name must not end it.
    quote(&mut out, &text(file)?.replace(char::is_control, "?"));
    out.push('\n');
    // Left over from elsewhere, they would go before what is set here.
    out.push_str("unset HSMCTL_CERT HSMCTL_KEY HSMCTL_PROFILE\n");
    let mut export = |name: &str, value: &str| {
        out.push_str("export ");
        out.push_str(name);
        out.push('=');
        quote(&mut out, value);
        out.push('\n');
    };
    export("HSMCTL_ENDPOINTS", &endpoints.join(","));
    export("HSMCTL_PKI", &text(pki)?);
    export("HSMCTL_CA", &text(&pki.join("ca.crt"))?);
    for (name, value) in secrets {
        export(name, value);
    }
    Ok(out)
}

/// In single quotes nothing is special but the single quote.
fn quote(out: &mut String, value: &str) {
    out.push('\'');
    for c in value.chars() {
        if c == '\'' {
            out.push_str("'\\''");
        } else {
            out.push(c);
        }
    }
    out.push('\'');
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn secrets() -> Vec<(&'static str, Zeroizing<String>)> {
        vec![
            ("HSM_PIN_EXCHANGE", Zeroizing::new("PIN $x `y`".to_owned())),
            (REPLICATION_ENV, Zeroizing::new("00ff".to_owned())),
        ]
    }

    #[test]
    fn every_value_is_exported_and_quoted() {
        let endpoints = ["https://127.0.0.1:1".to_owned(), "https://127.0.0.1:2".to_owned()];
        let file = Path::new("/tmp/it's here/env");
        let text = render(file, &endpoints, Path::new("/tmp/it's here/pki"), &secrets()).unwrap();
        let first = text.lines().next().unwrap();
        assert!(
            first.ends_with(r"Use it with: . '/tmp/it'\''s here/env'"),
            "{first}"
        );
        for line in [
            "export HSMCTL_ENDPOINTS='https://127.0.0.1:1,https://127.0.0.1:2'",
            r"export HSMCTL_PKI='/tmp/it'\''s here/pki'",
            r"export HSMCTL_CA='/tmp/it'\''s here/pki/ca.crt'",
            "export HSM_PIN_EXCHANGE='PIN $x `y`'",
            "export TOKEN_REPLICATION_KEY='00ff'",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is missing");
        }
    }

    #[test]
    fn a_strict_shell_reads_back_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        let named = Path::new("/it's\nfalse #/env");
        let text = render(
            named,
            &["https://a:1".to_owned()],
            Path::new("/it's/pki"),
            &secrets(),
        )
        .unwrap();
        files::write(&file, text.as_bytes()).unwrap();
        let output = std::process::Command::new("sh")
            .args([
                "-euc",
                ". \"$1\"; printf '%s\\n' \"$HSM_PIN_EXCHANGE\" \"$HSMCTL_PKI\" \"$HSMCTL_ENDPOINTS\"",
            ])
            .arg("sh")
            .arg(&file)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "PIN $x `y`\n/it's/pki\nhttps://a:1\n"
        );
    }
}
