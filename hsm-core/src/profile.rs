//! What differs between PKCS#11 modules, found out once when a module is loaded. Everything
//! else in the crate asks the profile instead of a module's name.

use std::path::{Path, PathBuf};

use cryptoki::context::Info;

/// Families of modules that are treated differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// SoftHSM 2: keys are files, which it neither syncs nor locks for a process.
    SoftHsm,
    /// Everything else is taken for hardware that looks after its own storage.
    Other,
}

/// Who makes the IV of an AES-GCM encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IvSource {
    /// This process: 96 random bits.
    Host,
    /// The token, which writes it into the mechanism's parameters (some FIPS HSMs).
    TokenParam,
    /// The token, which appends it to the ciphertext.
    TokenAppended,
}

/// Hash of RSA-OAEP and of its mask generation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OaepHash {
    /// All that SoftHSM 2.6.1 offers. OAEP does not rest on collision resistance.
    Sha1,
    /// Preferred elsewhere.
    Sha256,
}

/// How a loaded module has to be treated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VendorProfile {
    /// The family.
    pub vendor: Vendor,
    /// Manufacturer and version, as `C_GetInfo` names them.
    pub library: String,
    /// Who makes IVs.
    pub iv_source: IvSource,
    /// Strongest hash first.
    pub oaep_hashes: &'static [OaepHash],
    /// Directory that holds a directory for each token; only for modules that keep files.
    pub token_root: Option<PathBuf>,
}

impl VendorProfile {
    /// The profile of the module that describes itself like this.
    pub(crate) fn detect(info: &Info) -> Self {
        let manufacturer = info.manufacturer_id();
        let library = format!("{} {}", manufacturer.trim(), info.library_version());
        if manufacturer.contains("SoftHSM") {
            Self {
                vendor: Vendor::SoftHsm,
                library,
                iv_source: IvSource::Host,
                oaep_hashes: &[OaepHash::Sha1],
                token_root: softhsm_token_root(),
            }
        } else {
            Self {
                vendor: Vendor::Other,
                library,
                iv_source: IvSource::Host,
                oaep_hashes: &[OaepHash::Sha256, OaepHash::Sha1],
                token_root: None,
            }
        }
    }

    /// The token directory of SoftHSM, if `library` is it by its file's name: known before the library
    /// is initialised, which is when it can still be kept from aborting the process.
    pub(crate) fn token_root_by_name(library: &Path) -> Option<PathBuf> {
        let name = library.file_name()?.to_string_lossy().to_lowercase();
        name.contains("softhsm").then(softhsm_token_root).flatten()
    }

    /// True if a token is no safer than the PIN its files are encrypted with.
    #[must_use]
    pub fn is_software(&self) -> bool {
        self.vendor == Vendor::SoftHsm
    }
}

/// SoftHSM's defaults on Debian; a configuration without `directories.tokendir` means the second.
const SYSTEM_CONFIG: &str = "/etc/softhsm/softhsm2.conf";
const DEFAULT_TOKEN_ROOT: &str = "/var/lib/softhsm/tokens";

/// The token directory of the configuration that SoftHSM itself reads: `SOFTHSM2_CONF`, else the
/// user's file, else the system's. `None` for its database back end, which keeps other files.
fn softhsm_token_root() -> Option<PathBuf> {
    let path = std::env::var_os("SOFTHSM2_CONF").map(PathBuf::from).or_else(|| {
        let user = Path::new(&std::env::var_os("HOME")?).join(".config/softhsm2/softhsm2.conf");
        user.is_file().then_some(user)
    });
    let path = path.unwrap_or_else(|| PathBuf::from(SYSTEM_CONFIG));
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let settings = parse(&text);
    if settings.database {
        return None;
    }
    Some(
        settings
            .token_root
            .unwrap_or_else(|| PathBuf::from(DEFAULT_TOKEN_ROOT)),
    )
}

#[derive(Default)]
struct Settings {
    token_root: Option<PathBuf>,
    database: bool,
}

/// `name = value` lines; a `#` ends the line wherever it stands, as in SoftHSM's own reader.
fn parse(text: &str) -> Settings {
    let mut settings = Settings::default();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        match name.trim() {
            "directories.tokendir" => settings.token_root = Some(PathBuf::from(value.trim())),
            "objectstore.backend" => settings.database = value.trim() == "db",
            _ => {}
        }
    }
    settings
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_token_directory_is_read_as_softhsm_reads_it() {
        let settings = parse(
            "# comment\n directories.tokendir =  /srv/tokens/ # here\nobjectstore.backend = file\nlog.level = INFO",
        );
        assert_eq!(settings.token_root.unwrap(), Path::new("/srv/tokens/"));
        assert!(!settings.database);
    }

    #[test]
    fn a_commented_directory_and_a_database_are_noticed() {
        let settings = parse("#directories.tokendir = /a\nobjectstore.backend = db\nnonsense\n");
        assert!(settings.token_root.is_none());
        assert!(settings.database);
    }
}
