//! No secret in any file that a node leaves: its logs, its store, snapshots, tokens, cores. Planted are all plaintexts, which
//! begin with the run's marker, the PINs of the tokens and the replication key; each is looked for as it is, in base64, in hex
//! and as a list of bytes.

use std::fs::File;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hsm_api::Base64;

use super::Found;
use super::observed::Observed;

pub(super) const NAME: &str = "canary";
/// Read at a time.
const CHUNK: usize = 1 << 20;

pub(super) fn judge(observed: &Observed, found: &mut Found) {
    found.checked(NAME, observed.searched);
    for leak in &observed.leaked {
        found.violation(NAME, leak.clone());
    }
    if observed.searched > 0 && !observed.search_finds {
        let text = "the search does not find the secrets where they have to be".to_owned();
        found.undecided(NAME, text);
    }
}

/// Something that must be nowhere.
pub(super) struct Canary {
    what: String,
    bytes: Vec<u8>,
}

impl Canary {
    /// As it is, as it travels, and as it would be printed by whoever forgot what it is. Of what something longer may follow,
    /// base64 is that of whole groups.
    pub(super) fn of(what: &str, secret: &[u8]) -> Vec<Self> {
        let whole = &secret[..secret.len() / 3 * 3];
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!("{secret:?}");
        let list = list.trim_matches(['[', ']']);
        [
            (what.to_owned(), secret.to_vec()),
            (
                format!("{what} in base64"),
                Base64::from(whole).to_string().into_bytes(),
            ),
            (format!("{what} in hex"), hex.into_bytes()),
            (format!("{what} as a list of bytes"), list.as_bytes().to_vec()),
        ]
        .into_iter()
        .map(|(what, bytes)| Self { what, bytes })
        .collect()
    }

    /// From one first byte to the next, as `skip_until` finds them: this is built without optimisation.
    fn is_in(&self, haystack: &[u8]) -> bool {
        let Some((first, rest)) = self.bytes.split_first() else {
            return true;
        };
        let mut left = haystack;
        while left.skip_until(*first).is_ok_and(|skipped| skipped > 0) {
            if !rest.is_empty() && left.starts_with(rest) {
                return true;
            }
        }
        false
    }
}

/// Every secret of a playground.
pub(super) fn planted(playground: &Path, marker: &str) -> Result<Vec<Canary>> {
    let mut canaries = Canary::of("a plaintext", marker.as_bytes());
    let secrets = playground.join("secrets");
    for entry in std::fs::read_dir(&secrets).with_context(|| secrets.display().to_string())? {
        let path = entry?.path();
        let secret = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let secret = secret.trim_ascii();
        canaries.extend(Canary::of(&name, secret));
        if let Some(bytes) = bytes_of(secret) {
            canaries.extend(Canary::of(&format!("{name}, decoded"), &bytes));
        }
    }
    Ok(canaries)
}

/// Of a secret that is written in hex.
fn bytes_of(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16)?).ok();
    let pairs = text.chunks(2).map(|pair| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    });
    let bytes: Option<Vec<u8>> = pairs.collect();
    bytes.filter(|bytes| bytes.len() >= 16)
}

/// What a search has found.
#[derive(Debug, Default)]
pub(super) struct Searched {
    pub(super) files: u64,
    pub(super) leaked: Vec<String>,
}

/// Searches whatever lies below a playground, but for the two places where the secrets are handed over.
pub(super) fn search(playground: &Path, canaries: &[Canary]) -> Result<Searched> {
    let mut searched = Searched::default();
    let spared = [playground.join("secrets"), playground.join("env")];
    below(playground, &spared, canaries, &mut searched)?;
    Ok(searched)
}

/// One that is gone when it is opened was not there; links are not followed.
fn below(dir: &Path, spared: &[PathBuf], canaries: &[Canary], searched: &mut Searched) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Ok(());
    };
    let entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    for path in entries.into_iter().filter(|path| !spared.contains(path)) {
        let Ok(kind) = path.symlink_metadata() else {
            continue;
        };
        if kind.is_dir() {
            below(&path, spared, canaries, searched)?;
        } else if kind.is_file()
            && let Ok(file) = File::open(&path)
        {
            searched.files += 1;
            for what in in_file(file, canaries).with_context(|| path.display().to_string())? {
                searched.leaked.push(format!("{what} is in {}", path.display()));
            }
        }
    }
    Ok(())
}

/// The names of those that are in a file.
fn in_file(mut file: impl Read, canaries: &[Canary]) -> Result<Vec<&str>> {
    let overlap = canaries
        .iter()
        .map(|canary| canary.bytes.len())
        .max()
        .unwrap_or_default();
    let (mut window, mut found) = (Vec::new(), vec![false; canaries.len()]);
    loop {
        let kept = window.len();
        let read = file.by_ref().take(CHUNK as u64).read_to_end(&mut window)?;
        for (canary, found) in canaries.iter().zip(&mut found) {
            *found = *found || canary.is_in(&window);
        }
        if read < CHUNK {
            break;
        }
        // What begins at the end of this part goes on in the next.
        window.drain(..(kept + read).saturating_sub(overlap));
    }
    let names = canaries.iter().zip(found).filter(|(_, found)| *found);
    Ok(names.map(|(canary, _)| canary.what.as_str()).collect())
}

/// Whether each of them is found where it has to be: the search itself is tried.
pub(super) fn finds(canaries: &[Canary]) -> bool {
    canaries.iter().all(|canary| {
        let mut text = vec![b'x'; CHUNK - canary.bytes.len() / 2];
        text.extend_from_slice(&canary.bytes);
        text.push(b'x');
        in_file(text.as_slice(), canaries).is_ok_and(|found| found.contains(&canary.what.as_str()))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::told;
    use super::*;

    #[test]
    fn a_secret_is_found_in_every_form_and_across_the_parts_of_a_file() {
        let canaries = Canary::of("a PIN", b"correct horse battery");
        assert!(finds(&canaries));
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("data/sled");
        std::fs::create_dir_all(&deep).unwrap();
        for (number, canary) in canaries.iter().enumerate() {
            let mut content = vec![0_u8; 2 * CHUNK - 3];
            content.extend_from_slice(&canary.bytes);
            std::fs::write(deep.join(number.to_string()), content).unwrap();
        }
        std::fs::write(dir.path().join("log"), b"correct horse, another battery").unwrap();
        std::fs::create_dir(dir.path().join("secrets")).unwrap();
        for spared in ["env", "secrets/exchange.pin"] {
            std::fs::write(dir.path().join(spared), b"correct horse battery").unwrap();
        }
        let searched = search(dir.path(), &canaries).unwrap();
        assert_eq!(
            (searched.files, searched.leaked.len()),
            (5, 4),
            "{:?}",
            searched.leaked
        );
    }

    #[test]
    fn a_key_that_is_written_in_hex_is_looked_for_as_it_is_too() {
        let key = [0x0f_u8; 16];
        assert_eq!(bytes_of("0f".repeat(16).as_bytes()), Some(key.to_vec()));
        for none in ["0f0f", "no hex at all, but long enough to be some", ""] {
            assert_eq!(bytes_of(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn a_plaintext_is_found_by_how_it_begins() {
        let canaries = Canary::of("a plaintext", b"CANARY-0001");
        let body = Base64::from(b"CANARY-0001-and what follows").to_string();
        let found = in_file(body.as_bytes(), &canaries).unwrap();
        assert_eq!(found, ["a plaintext in base64"]);
    }

    #[test]
    fn a_leak_is_a_violation_and_a_search_that_finds_nothing_anywhere_is_no_pass() {
        let mut observed = Observed {
            searched: 10,
            search_finds: true,
            ..Observed::default()
        };
        assert!(told(|found| judge(&observed, found)).is_empty());
        observed.leaked.push("a PIN is in log".to_owned());
        assert_eq!(told(|found| judge(&observed, found)), ["a PIN is in log"]);
        let mut found = Found::default();
        observed.search_finds = false;
        judge(&observed, &mut found);
        assert_eq!(found.undecided.len(), 1);
    }
}
