use std::os::unix::fs::PermissionsExt;

use super::*;

fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PinSource) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pin");
    std::fs::write(&path, content).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    (
        dir,
        PinSource::File {
            key: "hsm.slots.a.pin_file".to_owned(),
            path,
        },
    )
}

fn refusal(source: &PinSource) -> String {
    match read_pin(source) {
        Ok(_) => panic!("was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_pin_file_loses_its_last_newline_and_nothing_else() {
    let (_dir, source) = file(b" 12 34 \r\n", 0o400);
    assert_eq!(read_pin(&source).unwrap().expose(), " 12 34 ");
    let (_dir, source) = file(b"1234", 0o600);
    assert_eq!(read_pin(&source).unwrap().expose(), "1234");
}

#[test]
fn a_pin_file_that_others_can_read_is_refused() {
    for mode in [0o640, 0o604, 0o620] {
        let (_dir, source) = file(b"planted-secret", mode);
        let error = refusal(&source);
        assert!(
            error.starts_with("hsm.slots.a.pin_file: ") && error.contains("chmod 600"),
            "{error}"
        );
        assert!(!error.contains("planted-secret"));
    }
}

#[test]
fn what_cannot_be_a_pin_is_refused_without_repeating_it() {
    for (content, problem) in [
        (b"\n".to_vec(), "is empty"),
        (vec![b'x'; 5000], "longer than 4096"),
        (vec![0xff, 0xfe], "not UTF-8"),
    ] {
        let (_dir, source) = file(&content, 0o600);
        assert!(refusal(&source).contains(problem));
    }
}

#[test]
fn a_source_is_checked_without_reading_the_secret() {
    // Longer than any secret, and refused only when it is read.
    let (_dir, source) = file(&[b'x'; 5000], 0o600);
    assert!(check_pin(&source).is_ok() && read_pin(&source).is_err());
    let (_dir, source) = file(b"planted-secret", 0o640);
    let error = check_pin(&source).unwrap_err().to_string();
    assert!(error.contains("chmod 600"), "{error}");
}

#[test]
fn checking_makes_no_replication_key() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    check_replication_key(&ReplicationKeySource::DataDir, &data).unwrap();
    assert!(!data.exists());
}

#[test]
fn a_folder_or_a_missing_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let key = "k".to_owned();
    assert!(
        refusal(&PinSource::File {
            key: key.clone(),
            path: dir.path().into()
        })
        .contains("k: ")
    );
    let path = dir.path().join("none");
    assert!(refusal(&PinSource::File { key, path }).contains("give a readable file"));
}

#[test]
fn an_unset_variable_is_named() {
    let source = PinSource::Env {
        key: "k".to_owned(),
        variable: "HSM_TEST_NEVER_SET".to_owned(),
    };
    assert!(refusal(&source).contains("HSM_TEST_NEVER_SET is not set"));
}

#[test]
fn a_standalone_node_makes_its_replication_key_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let first = read_replication_key(&ReplicationKeySource::DataDir, &data).unwrap();
    let path = data.join(REPLICATION_KEY_FILE);
    assert_eq!(first.created.as_deref(), Some(path.as_path()));
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(
        std::fs::metadata(&data).unwrap().permissions().mode() & 0o777,
        0o700
    );
    let second = read_replication_key(&ReplicationKeySource::DataDir, &data).unwrap();
    assert!(second.created.is_none());
    assert_eq!(first.key.to_hex().as_str(), second.key.to_hex().as_str());
}

#[test]
fn a_damaged_replication_key_is_refused_and_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(REPLICATION_KEY_FILE);
    std::fs::write(&path, "tooshort").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let error = read_replication_key(&ReplicationKeySource::DataDir, dir.path())
        .err()
        .unwrap();
    assert!(error.to_string().contains("replication.key"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "tooshort");
}

/// What is read is the key that was made, or is refused as it is read, or is found not to be the cluster's before it seals
/// or opens anything.
#[test]
fn no_damage_makes_another_replication_key_pass_for_the_one_that_was_made() {
    use raft_store::names::ClusterId;
    use raft_store::state::ClusterMeta;

    use crate::sync::Replication;

    let dir = tempfile::tempdir().unwrap();
    let made = read_replication_key(&ReplicationKeySource::DataDir, dir.path()).unwrap();
    let path = dir.path().join(REPLICATION_KEY_FILE);
    let whole = std::fs::read(&path).unwrap();
    let cluster_id = ClusterId([4; 16]);
    let meta = ClusterMeta {
        cluster_id,
        name: "test".to_owned(),
        epoch: 1,
        feature_level: 1,
        trk_id: Replication::new(made.key, "replication.key").trk_id(cluster_id),
        created_at: 0,
    };
    let flips = (0..whole.len() * 8).map(|bit| {
        let mut contents = whole.clone();
        contents[bit / 8] ^= 1 << (bit % 8);
        contents
    });
    let cuts = (0..whole.len()).map(|length| whole[..length].to_vec());
    let (mut unread, mut wrong) = (0, 0);
    for (number, contents) in flips.chain(cuts).enumerate() {
        std::fs::write(&path, &contents).unwrap();
        match read_replication_key(&ReplicationKeySource::DataDir, dir.path()) {
            Err(error) => {
                let said = error.to_string();
                assert!(
                    said.contains("replication.key") && said.contains("put the copy back"),
                    "damage {number}: {said}"
                );
                unread += 1;
            }
            Ok(read) => {
                assert!(read.created.is_none(), "damage {number}: replaced");
                let same = read.key.to_hex().as_bytes().eq_ignore_ascii_case(&whole);
                let replication = Replication::new(read.key, "replication.key");
                match replication.for_cluster(&meta) {
                    Ok(_) => assert!(same, "damage {number}: another key passed"),
                    Err(error) => {
                        let said = error.to_string();
                        assert!(said.contains("replication.key"), "damage {number}: {said}");
                        wrong += 1;
                    }
                }
            }
        }
        assert_eq!(std::fs::read(&path).unwrap(), contents, "damage {number}");
    }
    assert!(unread > 0 && wrong > 0, "{unread} unread, {wrong} wrong");
}

#[test]
fn a_hardened_process_leaves_no_core_and_cannot_be_read() {
    harden_process().unwrap();
    assert!(!nix::sys::prctl::get_dumpable().unwrap());
    let (soft, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_CORE).unwrap();
    assert_eq!((soft, hard), (0, 0));
}
