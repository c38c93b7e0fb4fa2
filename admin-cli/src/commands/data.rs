//! `hsmctl encrypt` and `decrypt`. Plaintexts come from a file or standard input and go to standard output;
//! they are never arguments, and buffers that held one are wiped.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Base64, Client, StateIndex};
use zeroize::Zeroizing;

use super::{READ, Session};
use crate::files::read_bounded;
use crate::output::{self, Format, note};
use crate::terminal::{Questions, announce_stdin};

/// More than the largest body any node can be configured to take.
const MAX_INPUT: usize = 64 << 20;

/// Arguments of `encrypt`.
#[derive(Debug, Args)]
pub(crate) struct Encrypt {
    /// Whose active key encrypts.
    #[arg(long)]
    context: String,
    /// File with the plaintext [default: standard input].
    #[arg(long, value_name = "FILE")]
    plaintext_file: Option<PathBuf>,
    /// File with associated data: authenticated, not stored, needed again to decrypt.
    #[arg(long, value_name = "FILE")]
    aad_file: Option<PathBuf>,
    /// Only from a state at least this new, as `index` of a change's answer: EPOCH.INDEX.
    #[arg(long, value_name = "INDEX")]
    min_index: Option<StateIndex>,
}

/// Arguments of `decrypt`.
#[derive(Debug, Args)]
pub(crate) struct Decrypt {
    /// The context it was encrypted in.
    #[arg(long)]
    context: String,
    /// File with the ciphertext in base64 [default: standard input].
    #[arg(long, value_name = "FILE")]
    ciphertext_file: Option<PathBuf>,
    /// Label of the key version; needed for ciphertexts of version 1 only.
    #[arg(long, value_name = "LABEL")]
    key_id: Option<String>,
    /// File with the associated data it was encrypted with.
    #[arg(long, value_name = "FILE")]
    aad_file: Option<PathBuf>,
    /// Only from a state at least this new, as `index` of a change's answer: EPOCH.INDEX.
    #[arg(long, value_name = "INDEX")]
    min_index: Option<StateIndex>,
}

fn client(session: &Session, min_index: Option<StateIndex>) -> Result<Client> {
    let client = session.client(READ)?;
    Ok(match min_index {
        Some(index) => client.with_min_index(index),
        None => client,
    })
}

pub(super) async fn encrypt(session: &Session, args: &Encrypt) -> Result<()> {
    let client = client(session, args.min_index)?;
    let plaintext = match args.plaintext_file.as_deref() {
        Some(path) => file(path, "the plaintext")?,
        None => stdin(session.questions(), "the plaintext", "--plaintext-file")?,
    };
    let mut request = EncryptRequest::new(args.context.as_str(), plaintext);
    request.aad = aad(args.aad_file.as_deref())?;
    let answer = session.ask(&client, "encrypt", client.encrypt(&request)).await?;
    let sealed = &answer.body;
    if session.format() == Format::Table {
        note(&format!(
            "encrypted under {} (version {})",
            sealed.key_id, sealed.key_version
        ));
    }
    output::print(session.format(), sealed, || sealed.ciphertext.to_string())
}

pub(super) async fn decrypt(session: &Session, args: Decrypt) -> Result<()> {
    let client = client(session, args.min_index)?;
    let text = match args.ciphertext_file.as_deref() {
        Some(path) => file(path, "the ciphertext")?,
        None => stdin(session.questions(), "the ciphertext", "--ciphertext-file")?,
    };
    let mut request = DecryptRequest::new(args.context, ciphertext(&text)?);
    request.key_id = args.key_id;
    request.aad = aad(args.aad_file.as_deref())?;
    let answer = session.ask(&client, "decrypt", client.decrypt(&request)).await?;
    match session.format() {
        Format::Table => output::bytes(answer.plaintext.as_slice()),
        Format::Json | Format::Yaml => {
            output::secret_json(&answer.body, answer.plaintext.as_slice().len() * 4 / 3 + 64)
        }
    }
}

/// Base64 with any white space in it.
fn ciphertext(text: &[u8]) -> Result<Base64> {
    let compact: String = text
        .iter()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|byte| char::from(*byte))
        .collect();
    if compact.is_empty() {
        bail!("the ciphertext is empty; give base64 as `hsmctl encrypt` prints it");
    }
    compact
        .parse::<Base64>()
        .map_err(|error| anyhow::anyhow!("the ciphertext: {error}; give it as `hsmctl encrypt` prints it"))
}

fn aad(path: Option<&Path>) -> Result<Option<Base64>> {
    let Some(path) = path else { return Ok(None) };
    let bytes = file(path, "the associated data")?;
    Ok(Some(Base64::from(bytes.as_slice())))
}

fn file(path: &Path, what: &str) -> Result<Zeroizing<Vec<u8>>> {
    let file = File::open(path).with_context(|| format!("{what}: {}: cannot be read", path.display()))?;
    read_bounded(file, MAX_INPUT, what)
}

/// `option` names a file in its place.
fn stdin(questions: Questions, what: &str, option: &str) -> Result<Zeroizing<Vec<u8>>> {
    announce_stdin(questions, what, option)?;
    read_bounded(unbuffered_stdin()?, MAX_INPUT, what)
}

/// Standard input without the buffer that Rust puts before it and never wipes.
pub(super) fn unbuffered_stdin() -> Result<File> {
    let descriptor = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("standard input")?;
    Ok(File::from(descriptor))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_ciphertext_may_be_wrapped_over_lines() {
        assert_eq!(ciphertext(b" YWJj\r\nZGVm\n").unwrap().as_slice(), b"abcdef");
    }

    #[test]
    fn what_is_no_base64_is_refused_here() {
        for text in [&b""[..], b" \n", b"YWJ", b"\xff\xfe", b"YWJj!"] {
            assert!(ciphertext(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = file(Path::new("/nonexistent/x"), "the plaintext").unwrap_err();
        assert!(
            format!("{error:#}").contains("the plaintext: /nonexistent/x"),
            "{error:#}"
        );
    }
}
