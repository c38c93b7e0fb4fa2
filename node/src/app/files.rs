//! The files that the configuration names, read in one place for the start and for `--check`, so that neither
//! accepts what the other refuses.

use std::sync::Arc;

use raft_store::storage::Control;

use super::{StartFailure, descriptors, v1_keys};
use crate::admin::Seed;
use crate::admin::revoked_file::Faults;
use crate::config::{Config, PeerListener};
use crate::logging;
use crate::secrets::{check_pin, check_replication_key};
use crate::sync::ClusterSigner;
use crate::tls::{ApiTls, ClusterTls, load_api, load_cluster};

/// What peers speak on the cluster listener.
const CLUSTER_PROTOCOL: &[u8] = b"hsm-cluster/1";

/// Certificates, and what the configuration brings into a new cluster.
pub(super) struct Files {
    pub(super) api_tls: ApiTls,
    pub(super) cluster_tls: Option<Arc<ClusterTls>>,
    pub(super) signer: Option<ClusterSigner>,
    pub(super) seed: Seed,
    /// What is wrong with `acl.revoked_file`. Whether it stops the start is known once it is known if there is a cluster.
    pub(super) revoked_faults: Faults,
}

impl Files {
    pub(super) fn read(config: &Config) -> Result<Self, StartFailure> {
        let peer = config.cluster.peer.as_ref();
        let cluster_ca = peer.map(|peer| peer.tls.ca_path.as_path());
        let api_tls = load_api(&config.server.tls, cluster_ca, config.dev)?;
        let cluster_tls = peer.map(|peer| cluster_tls(config, peer)).transpose()?;
        let signer = peer
            .zip(cluster_tls.as_ref())
            .map(|(peer, tls)| ClusterSigner::from_files(&peer.tls, Arc::clone(&tls.verifier)))
            .transpose()
            .map_err(|error| StartFailure::Signer(error.to_string()))?;
        let (seed, revoked_faults) = Seed::of(config, &api_tls.issuers)?;
        Ok(Self {
            api_tls,
            cluster_tls,
            signer,
            seed,
            revoked_faults,
        })
    }
}

/// Reads everything that a start would read before it opens a token. Makes nothing; of PINs only the sources
/// are looked at.
pub(super) fn check(config: &Config) -> Result<(), StartFailure> {
    // Of this process: the node may be started with another limit.
    if let Err(error) = descriptors::room(&config.server.limits) {
        tracing::warn!("with this process's limit of file descriptors the node would not start: {error}");
    }
    // The store belongs to the node, which may be running.
    let founded = Control::peek(&config.data_dir).map(|control| control.is_some_and(|it| it.is_founded()));
    let founded = founded.map_err(|error| {
        let dir = config.data_dir.display();
        tracing::warn!("data_dir: {dir}: {error}; what a start would do there is not checked");
    });
    let Files {
        seed, revoked_faults, ..
    } = Files::read(config)?;
    seed.check_revoked(founded.unwrap_or(false), revoked_faults)?;
    seed.warn_of_unwritten_admins(founded.unwrap_or(true));
    logging::check(&config.logging)?;
    for slot in &config.hsm.slots {
        check_pin(&slot.pin)?;
    }
    let replication = &config.cluster.replication;
    for source in std::iter::once(&replication.key).chain(&replication.previous) {
        check_replication_key(source, &config.data_dir)?;
    }
    founded.map_or(Ok(()), |founded| v1_keys::check_list(config, founded))
}

fn cluster_tls(config: &Config, peer: &PeerListener) -> Result<Arc<ClusterTls>, StartFailure> {
    let (name, node) = (&config.cluster.name, config.cluster.node_id.as_str());
    Ok(Arc::new(load_cluster(
        &peer.tls,
        name,
        node,
        &[CLUSTER_PROTOCOL],
        config.dev,
    )?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use raft_store::names::{ClusterId, Incarnation};
    use raft_store::storage::{Opened, Store, StoreOptions};

    use super::*;
    use crate::admin::revoked_file::RevokedFile;
    use crate::identity::test_certs::TestCa;
    use crate::test_log::Lines;

    /// A standalone node's files, each of which a test may spoil.
    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            let folder = Self(tempfile::tempdir().unwrap());
            let ca = TestCa::new("Clients");
            folder.write("ca.crt", &ca.pem);
            ca.server("server", None).write(folder.0.path(), "server");
            folder.write("pin", "0123456789abcdef0123456789abcdef");
            folder.write("trk", &"ab".repeat(32));
            folder.write("revoked.yaml", "revoked: [{cn: gone}]\n");
            folder
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, name: &str, content: &str) {
            std::fs::write(self.path(name), content).unwrap();
            self.mode(name, 0o600);
        }

        fn mode(&self, name: &str, mode: u32) {
            std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }

        fn check(&self, further: &str) -> Result<(), String> {
            let at = |name: &str| self.path(name).display().to_string();
            let text = format!(
                "server: {{tls: {{ca_path: {}, cert_path: {}, key_path: {}}}}}\n\
                 data_dir: {}\n\
                 hsm: {{slots: {{a: {{label: a, pin_file: {}, contexts: [c]}}}}}}\n\
                 acl: {{revoked_file: {}}}\n\
                 cluster: {{mode: standalone, token_replication: {{encryption_key_file: {}}}}}\n\
                 {further}\n",
                at("ca.crt"),
                at("server.crt"),
                at("server.key"),
                at("data"),
                at("pin"),
                at("revoked.yaml"),
                at("trk"),
            );
            let none = |_: &str| -> Option<String> { None };
            let config = Config::parse(&text, Path::new("config.yaml"), Some(0o600), &none).unwrap();
            check(&config).map_err(|failure| failure.to_string())
        }
    }

    #[test]
    fn a_complete_set_of_files_passes_and_nothing_is_made() {
        let folder = Folder::new();
        assert_eq!(folder.check(""), Ok(()));
        assert!(!folder.path("data").exists());
    }

    #[test]
    fn each_file_that_a_start_would_refuse_is_named_with_its_key() {
        type Spoil = fn(&Folder);
        let spoil: [(&str, Spoil); 8] = [
            ("server.tls.ca_path: ", |folder| folder.write("ca.crt", "x")),
            ("server.tls.key_path: ", |folder| {
                std::fs::remove_file(folder.path("server.key")).unwrap();
            }),
            ("hsm.slots.a.pin_file: ", |folder| folder.mode("pin", 0o640)),
            ("hsm.slots.a.pin_file: ", |folder| {
                std::fs::remove_file(folder.path("pin")).unwrap();
            }),
            ("cluster.token_replication.encryption_key_file", |folder| {
                folder.write("trk", "tooshort");
            }),
            ("cluster.token_replication.encryption_key_file", |folder| {
                folder.mode("trk", 0o644);
            }),
            ("config: acl.revoked_file: ", |folder| {
                folder.write("revoked.yaml", "revoked: [{reason: none}]\n");
            }),
            ("config: ", |folder| {
                std::fs::remove_file(folder.path("revoked.yaml")).unwrap();
            }),
        ];
        for (start, spoil) in spoil {
            let folder = Folder::new();
            spoil(&folder);
            let error = folder.check("").unwrap_err();
            assert!(error.starts_with(start), "{start}: {error}");
        }
        let folder = Folder::new();
        let log = |name: &str| format!("logging: {{audit_path: {}}}", folder.path(name).display());
        let error = folder.check(&log("server.crt/audit.log")).unwrap_err();
        assert!(error.starts_with("config: logging.audit_path: "), "{error}");
        // A start makes the folder and the file, a look makes neither.
        assert_eq!(folder.check(&log("logs/audit.log")), Ok(()));
        assert!(!folder.path("logs").exists());
        let role = "roles: {admin: [{ou: Admin, issuer: \"CN=Client\"}]}";
        let error = Folder::new().check(role).unwrap_err();
        assert!(
            error.starts_with("config: roles.admin[0].issuer: CN=Client: "),
            "{error}"
        );
        assert!(error.ends_with("did you mean CN=Clients?"), "{error}");
    }

    /// As version 1's file names them; its list of keys is `metadata.yaml`.
    fn check_as_v1(folder: &Folder) -> Result<(), String> {
        check_as_v1_with(folder, "")
    }

    fn check_as_v1_with(folder: &Folder, further: &str) -> Result<(), String> {
        let at = |name: &str| folder.path(name).display().to_string();
        let text = format!(
            "server: {{tls: {{ca_path: {}, cert_path: {}, key_path: {}}}}}\n\
             data_dir: {}\n\
             hsm: {{slot_id: t, pin: \"1234\", metadata_file: {}, keys: {{c: {{mode: shared}}}}}}\n\
             acl: {{revoked_file: {}}}\n{further}",
            at("ca.crt"),
            at("server.crt"),
            at("server.key"),
            at("data"),
            at("metadata.yaml"),
            at("revoked.yaml"),
        );
        let config = Config::parse(&text, Path::new("config.yaml"), Some(0o600), &|_: &str| None).unwrap();
        check(&config).map_err(|failure| failure.to_string())
    }

    #[test]
    fn version_1s_list_of_keys_is_read_as_its_first_start_would() {
        let folder = Folder::new();
        assert_eq!(check_as_v1(&folder), Ok(()), "it is not there");
        let list = |context: &str| {
            let text =
                format!("rotation: {{{context}: {{current: a, versions: [{{label: a, version: 1}}]}}}}\n");
            folder.write("metadata.yaml", &text);
            check_as_v1(&folder)
        };
        assert_eq!(list("c"), Ok(()));
        let error = list("other").unwrap_err();
        assert!(error.contains("hsm.keys.other.mode"), "{error}");
        folder.write("metadata.yaml", "rotation: [");
        assert!(check_as_v1(&folder).is_err());
    }

    /// Opens the folder's store as a node that has founded its cluster, and keeps it open.
    fn found(folder: &Folder) -> Opened {
        let opened = Store::open(StoreOptions {
            dir: folder.path("data"),
            node_name: "n".to_owned(),
            incarnation: Incarnation([1; 16]),
            cache_bytes: 16 << 20,
            on_barrier: None,
            on_fatal: Box::new(|why| eprintln!("fatal: {why}")),
        })
        .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(check_as_v1(folder), Ok(()), "a new folder");
        opened.control.join_cluster(ClusterId([2; 16]), 1, 1).unwrap();
        opened
    }

    #[test]
    fn who_will_administer_is_said_before_version_1s_first_start_unless_it_is_written() {
        let folder = Folder::new();
        let warned = |further: &str| {
            let lines = Lines::of(|| assert_eq!(check_as_v1_with(&folder, further), Ok(())));
            let told = lines.count("message", "with the OU Admin becomes an administrator's");
            assert!(
                told == 0 || lines.text().contains("CN=Clients"),
                "{}",
                lines.text()
            );
            told
        };
        assert_eq!(warned(""), 1);
        assert_eq!(warned("roles: {admin: [{cn: ops-1}]}\n"), 0);
        let _node = found(&folder);
        assert_eq!(warned(""), 0, "the state says it by now");
        // Whoever writes a file of this version has read what it says of roles.
        let of_today = Lines::of(|| assert_eq!(Folder::new().check(""), Ok(())));
        assert_eq!(of_today.count("message", "OU Admin"), 0);
    }

    #[test]
    fn a_list_that_the_next_start_does_not_read_is_not_checked() {
        let folder = Folder::new();
        let list = |text: &str| folder.write("metadata.yaml", text);
        let other = "rotation: {other: {current: a, versions: [{label: a, version: 1}]}}\n";
        // The note of a cluster that is no more.
        std::fs::create_dir(folder.path("data")).unwrap();
        folder.write(
            "data/v1-metadata",
            "hsm v1 metadata adopted v1\n00\nmetadata.yaml\n",
        );
        list(other);
        assert!(check_as_v1(&folder).unwrap_err().contains("hsm.keys.other.mode"));
        list("rotation: {}");

        let _node = found(&folder);
        list("rotation: [");
        assert_eq!(
            check_as_v1(&folder),
            Ok(()),
            "it was adopted, and is not read again"
        );
        std::fs::remove_file(folder.path("data/v1-metadata")).unwrap();
        assert!(check_as_v1(&folder).is_err(), "it is named, and will be read");
        // To whom its contexts are bound the state says by now.
        list(other);
        assert_eq!(check_as_v1(&folder), Ok(()));
    }

    #[test]
    fn without_its_list_of_revocations_version_1_starts_every_time_and_others_once_they_have_a_cluster() {
        let folder = Folder::new();
        let path = folder.path("revoked.yaml");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(check_as_v1(&folder), Ok(()));
        let seed = |of_version_1| Seed {
            file: Some(RevokedFile::open(&path, Duration::ZERO, &[]).0),
            of_version_1,
            ..Seed::default()
        };
        let warned = |seed: &Seed, founded| {
            let lines = Lines::of(|| seed.check_revoked(founded, Faults::default()).unwrap());
            assert_eq!(lines.count("message", "revoked.yaml is not there"), 1);
            lines.text()
        };
        assert!(warned(&seed(true), false).contains("nobody is revoked"));
        for of_version_1 in [true, false] {
            assert!(warned(&seed(of_version_1), true).contains("stays revoked"));
        }
        let error = seed(false)
            .check_revoked(false, Faults::default())
            .unwrap_err()
            .to_string();
        let shown = path.display();
        assert!(
            error.starts_with(&format!("config: acl.revoked_file: {shown}: is not there")),
            "{error}"
        );
        Seed::default().check_revoked(false, Faults::default()).unwrap();
        // One that is there is read.
        folder.write("revoked.yaml", "revoked: [{reason: none}]\n");
        assert!(check_as_v1(&folder).is_err());
    }

    #[test]
    fn a_list_of_revocations_that_has_faults_keeps_only_a_node_without_a_cluster_from_starting() {
        let folder = Folder::new();
        let path = folder.path("revoked.yaml");
        for (text, entries, fault) in [
            (
                "revoked:\n  - reason: none\n  - cn: a\n",
                1,
                "until then it revokes nobody",
            ),
            ("revoked: [{cn: \n", 0, "what it has said before stays revoked"),
        ] {
            folder.write("revoked.yaml", text);
            let open = || RevokedFile::open(&path, Duration::ZERO, &[]);
            let (file, faults) = open();
            assert_eq!(file.listed().load().len(), entries, "what can be used");
            let seed = Seed {
                file: Some(file),
                ..Seed::default()
            };
            assert!(seed.check_revoked(false, faults).is_err(), "{text:?}");
            let lines = Lines::of(|| seed.check_revoked(true, open().1).unwrap());
            assert_eq!(lines.count("message", fault), 1, "{}", lines.text());
        }
        // So it is with a look at the configuration.
        folder.write("revoked.yaml", "revoked: [{cn: gone}]\n");
        let _node = found(&folder);
        folder.write("revoked.yaml", "revoked: [{reason: none}]\n");
        let lines = Lines::of(|| assert_eq!(check_as_v1(&folder), Ok(())));
        assert_eq!(
            lines.count("message", "acl.revoked_file: "),
            1,
            "{}",
            lines.text()
        );
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let lines = Lines::of(|| assert_eq!(check_as_v1(&folder), Ok(())));
        assert_eq!(
            lines.count("message", "it is no regular file"),
            1,
            "{}",
            lines.text()
        );
    }
}
