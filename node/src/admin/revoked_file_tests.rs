//! What a node makes of its file of revocations while it runs.

use std::sync::atomic::Ordering;

use raft_store::command::{AddRevocations, Op, RemoveRevocations};

use super::*;
use crate::admin::access::{MAX_KEPT, revocations};
use crate::consensus::ProposeError;
use crate::rotation::testing::{FakeCluster, World};
use crate::test_log::Lines;

/// A file, and what a node has read of it.
struct Site {
    folder: tempfile::TempDir,
    file: RevokedFile,
}

impl Site {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("revoked.yaml");
        std::fs::write(&path, text).unwrap();
        let file = RevokedFile::open(&path, Duration::from_millis(100), &["CN=A".to_owned()]).0;
        Self { folder, file }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("revoked.yaml")
    }

    fn write(&self, text: &str) {
        std::fs::write(self.path(), text).unwrap();
    }

    /// What is logged while the file is looked at, by a cluster's node.
    async fn look(&mut self) -> Lines {
        let lines = Lines::default();
        let logged_here = lines.collect();
        // The reading itself is another thread's, and says nothing.
        self.has_changed(true).await;
        drop(logged_here);
        lines
    }

    /// Whether there is anything new, which is found twice.
    async fn has_changed(&mut self, is_founded: bool) -> bool {
        let first = self.file.look(is_founded).await;
        first == Look::Unsettled && self.file.look(is_founded).await == Look::Changed
    }

    fn names(&self) -> Vec<String> {
        names(&self.file.listed.load())
    }
}

fn names(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|(key, _)| revocations::text(key)).collect()
}

fn by_cn(cn: &str) -> Entry {
    (RevocationKey::CommonName(cn.to_owned()), String::new())
}

fn revoked(cluster: &FakeCluster) -> Vec<String> {
    cluster.with(|world| {
        let rows = world.state.revocations().iter();
        rows.map(|(key, _)| revocations::text(key)).collect()
    })
}

fn commands(cluster: &FakeCluster) -> usize {
    cluster.count(|op| matches!(op, Op::AddRevocations(_)))
}

fn unrevoke(cluster: &FakeCluster, cn: &str) {
    cluster.with(|world| {
        world.ok(Op::RemoveRevocations(RemoveRevocations {
            revocations: vec![by_cn(cn).0],
        }));
    });
}

#[tokio::test]
async fn what_is_appended_is_listed_and_the_same_text_is_not_read_twice() {
    let mut site = Site::new("revoked: [{cn: a}]\n");
    assert_eq!(site.names(), ["cn a"]);
    assert_eq!(site.file.look(true).await, Look::AsItWas);
    site.write("revoked: [{cn: a}, {cn: b}]\n");
    assert!(site.has_changed(true).await);
    assert_eq!(site.names(), ["cn a", "cn b"]);
    assert_eq!(site.file.look(true).await, Look::AsItWas);
}

#[tokio::test]
async fn an_entry_that_cannot_be_used_is_named_once_and_keeps_no_other_out() {
    let mut site = Site::new("revoked: []\n");
    site.write("revoked:\n  - cn: a\n  - reason: nobody\n  - serial: zebra\n  - cn: b\n");
    let said = site.look().await;
    assert_eq!(site.names(), ["cn a", "cn b"]);
    for (line, problem) in [(3, "revokes nothing"), (4, "\"zebra\" is not a serial number")] {
        let place = format!("revoked.yaml, line {line}: ");
        let lines = said.all();
        let found = lines.iter().find(|said| {
            let text = said["message"].as_str().unwrap();
            text.contains(&place) && text.contains(problem)
        });
        let found = found.unwrap_or_else(|| panic!("{place}{problem}: {lines:#?}"));
        assert_eq!(found["level"], "WARN");
    }
    assert_eq!(said.count("message", "give cn or serial"), 1, "the remedy");
    assert_eq!(site.look().await.text(), "");
}

#[tokio::test]
async fn of_many_useless_entries_only_some_are_named() {
    let mut site = Site::new("revoked: []\n");
    site.write(&format!("revoked:\n{}", "  - reason: x\n".repeat(1000)));
    let said = site.look().await;
    assert_eq!(said.count("message", "revokes nothing"), NAMED);
    assert_eq!(said.all().last().unwrap()["useless"], 1000);
}

#[tokio::test]
async fn what_cannot_be_read_leaves_the_list_as_it_was_and_is_said_once() {
    let mut site = Site::new("revoked: [{cn: a}]\n");
    site.write("revoked: [{cn: \n");
    let said = site.look().await;
    assert_eq!(said.count("message", "the list is left as it was read before"), 1);
    assert_eq!(said.count("message", "line "), 1);
    assert_eq!(site.names(), ["cn a"]);
    assert_eq!(site.look().await.text(), "");
    // Not text at all, and then as it was.
    std::fs::write(site.path(), [0xff_u8, 0xfe]).unwrap();
    assert_eq!(site.look().await.count("message", "cannot be read"), 1);
    site.write("revoked: [{cn: a}]\n");
    site.look().await;
    assert_eq!(site.names(), ["cn a"]);
}

#[tokio::test]
async fn a_file_that_is_gone_is_said_once_and_is_read_when_it_is_back() {
    let mut site = Site::new("revoked: [{cn: a}]\n");
    std::fs::remove_file(site.path()).unwrap();
    // The only one who knows.
    assert!(site.has_changed(false).await);
    assert_eq!(
        (site.names(), site.file.missing()),
        (vec!["cn a".to_owned()], Some(&*site.path()))
    );
    site.write("revoked: [{cn: a}]\n");
    site.look().await;

    std::fs::remove_file(site.path()).unwrap();
    let said = site.look().await;
    assert_eq!(said.count("message", "is not there any more"), 1);
    assert!(site.names().is_empty());
    assert_eq!(site.look().await.text(), "");
    site.write("revoked: [{cn: b}]\n");
    site.look().await;
    assert_eq!(
        (site.names(), site.file.missing()),
        (vec!["cn b".to_owned()], None)
    );
}

#[tokio::test]
async fn the_leader_adds_what_is_listed_and_so_does_whoever_reaches_it() {
    for follower in [false, true] {
        let cluster = FakeCluster::new(World::new(1));
        if follower {
            *cluster.leadership.lock().unwrap() = None;
            cluster.led_elsewhere.store(true, Ordering::SeqCst);
        }
        let mut pending = Pending::default();
        let listed: Vec<Entry> = (0..250).map(|n| by_cn(&n.to_string())).collect();
        assert!(pass(&*cluster, &listed, &mut pending).await);
        assert_eq!((revoked(&cluster).len(), commands(&cluster)), (250, 3));
        // An idle cluster appends nothing.
        assert!(pass(&*cluster, &listed, &mut pending).await);
        assert_eq!(commands(&cluster), 3);
        // Only added: a shorter list takes nothing back.
        assert!(pass(&*cluster, &listed[..1], &mut pending).await);
        assert!(pass(&*cluster, &[], &mut pending).await);
        assert_eq!(revoked(&cluster).len(), 250);
    }
}

#[tokio::test]
async fn without_a_leader_it_is_tried_again_even_if_the_file_is_gone_by_then() {
    let cluster = FakeCluster::new(World::new(1));
    let leadership = cluster.leadership.lock().unwrap().take();
    let mut pending = Pending::default();
    assert!(!pass(&*cluster, &[by_cn("a")], &mut pending).await);
    pending.anew(true);
    assert!(!pass(&*cluster, &[], &mut pending).await);
    assert_eq!(commands(&cluster), 0);
    *cluster.leadership.lock().unwrap() = leadership;
    assert!(pass(&*cluster, &[], &mut pending).await);
    assert_eq!(revoked(&cluster), ["cn a"]);
    // And not once more when it is taken back.
    unrevoke(&cluster, "a");
    assert!(pass(&*cluster, &[], &mut pending).await);
    assert!(revoked(&cluster).is_empty());
    // As long as it stands in the file it is.
    assert!(pass(&*cluster, &[by_cn("a")], &mut pending).await);
    assert_eq!(revoked(&cluster), ["cn a"]);
}

#[tokio::test]
async fn a_failure_is_tried_again_and_what_was_done_is_not_done_twice() {
    let cluster = FakeCluster::new(World::new(1));
    let mut pending = Pending::default();
    for error in [ProposeError::NoQuorum, ProposeError::NoSpace] {
        cluster.failures.lock().unwrap().push((error, false));
        assert!(!pass(&*cluster, &[by_cn("a")], &mut pending).await);
        assert!(revoked(&cluster).is_empty());
    }
    // The answer is lost, and what was done is seen at the next attempt.
    cluster
        .failures
        .lock()
        .unwrap()
        .push((ProposeError::Unknown, true));
    assert!(!pass(&*cluster, &[by_cn("a")], &mut pending).await);
    assert!(pass(&*cluster, &[by_cn("a")], &mut pending).await);
    assert_eq!(
        (revoked(&cluster), commands(&cluster)),
        (vec!["cn a".to_owned()], 1)
    );
}

#[tokio::test]
async fn what_is_refused_is_not_asked_again_until_the_file_has_changed() {
    let cluster = FakeCluster::new(World::new(1));
    let mut pending = Pending::default();
    let refused = ProposeError::TooLarge { bytes: 1 << 20 };
    cluster.failures.lock().unwrap().push((refused, false));
    assert!(pass(&*cluster, &[by_cn("a")], &mut pending).await);
    assert!(pass(&*cluster, &[by_cn("a")], &mut pending).await);
    assert_eq!(commands(&cluster), 0);
    pending.anew(false);
    assert!(pass(&*cluster, &[by_cn("a")], &mut pending).await);
    assert_eq!(commands(&cluster), 1);
}

#[tokio::test]
async fn what_was_refused_is_forgotten_once_the_file_is_corrected() {
    for is_gone in [false, true] {
        let cluster = FakeCluster::new(World::new(1));
        let mut pending = Pending::default();
        let refused = ProposeError::TooLarge { bytes: 1 << 20 };
        cluster.failures.lock().unwrap().push((refused, false));
        let too_many: Vec<Entry> = (0..MAX_KEPT).map(|n| by_cn(&n.to_string())).collect();
        assert!(pass(&*cluster, &too_many, &mut pending).await);
        assert_eq!(pending.entries.len(), MAX_KEPT);
        pending.anew(is_gone);
        assert!(pass(&*cluster, &[by_cn("new")], &mut pending).await);
        assert_eq!(revoked(&cluster), ["cn new"]);
    }
}

#[tokio::test]
async fn what_is_taken_out_and_taken_back_is_not_revoked_again_by_the_text_before() {
    let mut site = Site::new("revoked: [{cn: x}]\n");
    let cluster = FakeCluster::new(World::new(1));
    let mut pending = Pending::default();
    let mut due = Instant::now();
    assert!(step(&*cluster, &mut site.file, &mut pending, &mut due).await);
    assert_eq!(revoked(&cluster), ["cn x"]);
    site.write("revoked: []\n");
    unrevoke(&cluster, "x");
    due = Instant::now();
    assert!(step(&*cluster, &mut site.file, &mut pending, &mut due).await);
    assert!(site.file.newer.is_some());
    // Not at a look: an attempt in between.
    due = Instant::now() + Duration::from_secs(60);
    assert!(step(&*cluster, &mut site.file, &mut pending, &mut due).await);
    due = Instant::now();
    assert!(step(&*cluster, &mut site.file, &mut pending, &mut due).await);
    assert!(site.file.newer.is_none());
    assert_eq!((revoked(&cluster).len(), commands(&cluster)), (0, 1));
}

#[tokio::test]
async fn what_waits_for_a_leader_is_not_added_once_the_file_lacks_it() {
    let mut site = Site::new("revoked: [{cn: x}, {cn: y}]\n");
    let cluster = FakeCluster::new(World::new(1));
    let leadership = cluster.leadership.lock().unwrap().take();
    let mut pending = Pending::default();
    let mut due = Instant::now();
    assert!(!step(&*cluster, &mut site.file, &mut pending, &mut due).await);
    assert_eq!(pending.entries.len(), 2);
    site.write("revoked: [{cn: y}]\n");
    for _ in 0..2 {
        due = Instant::now();
        assert!(!step(&*cluster, &mut site.file, &mut pending, &mut due).await);
    }
    *cluster.leadership.lock().unwrap() = leadership;
    assert!(step(&*cluster, &mut site.file, &mut pending, &mut due).await);
    assert_eq!(revoked(&cluster), ["cn y"]);
}

#[tokio::test]
async fn what_is_refused_is_asked_for_again_after_a_while_and_said_once() {
    let cluster = FakeCluster::new(World::new(1));
    let mut pending = Pending::default();
    let lines = Lines::default();
    let logged_here = lines.collect();
    for _ in 0..2 {
        let refused = ProposeError::TooLarge { bytes: 1 << 20 };
        cluster.failures.lock().unwrap().push((refused, false));
        assert!(pass(&*cluster, &[by_cn("a")], &mut pending).await);
        assert!(pending.is_held());
        pending.held_until = Some(Instant::now());
    }
    // Somebody has made room.
    assert!(pass(&*cluster, &[by_cn("a")], &mut pending).await);
    drop(logged_here);
    assert_eq!(revoked(&cluster), ["cn a"]);
    assert_eq!(lines.count("message", "not added"), 1);
}

#[tokio::test]
async fn a_file_that_is_being_written_is_not_believed_yet() {
    let mut site = Site::new("revoked: []\n");
    for half in ["revoked:\n  - cn: ad", "revoked:\n  - cn: admin", ""] {
        site.write(half);
        assert_eq!(site.file.look(true).await, Look::Unsettled, "{half:?}");
        assert!(site.names().is_empty());
    }
    // Replaced by one that takes its place.
    std::fs::remove_file(site.path()).unwrap();
    assert_eq!(site.file.look(true).await, Look::Unsettled);
    site.write("revoked:\n  - cn: admin-2\n");
    assert!(site.has_changed(true).await);
    assert_eq!(site.names(), ["cn admin-2"]);
    // Found once, and as it was again.
    site.write("revoked: []\n");
    assert_eq!(site.file.look(true).await, Look::Unsettled);
    site.write("revoked:\n  - cn: admin-2\n");
    assert_eq!(site.file.look(true).await, Look::AsItWas);
    site.write("revoked: []\n");
    assert_eq!(site.file.look(true).await, Look::Unsettled);
}

#[tokio::test]
async fn an_unknown_issuer_is_named_once() {
    let mut site = Site::new("revoked: []\n");
    let entry = |serial: u32, issuer: &str| format!("  - {{serial: '{serial}', issuer: '{issuer}'}}\n");
    let known = entry(1, "CN=A");
    let others: String = (1..100).map(|serial| entry(serial, "CN=Other")).collect();
    site.write(&format!("revoked:\n{known}{others}"));
    let said = site.look().await;
    assert_eq!(site.names().len(), 100);
    assert_eq!(said.count("message", "none of the configured client CAs"), 1);
    assert_eq!(said.count("issuer", "CN=Other"), 1);
}

#[tokio::test]
async fn who_is_no_member_adds_nothing_and_waits() {
    let mut world = World::new(1);
    world.state = raft_store::state::ClusterState::default();
    let cluster = FakeCluster::new(world);
    let mut pending = Pending::default();
    assert!(!pass(&*cluster, &[by_cn("a")], &mut pending).await);
    assert!(pass(&*cluster, &[], &mut pending).await, "nothing is to be added");
}

#[tokio::test]
async fn a_node_that_runs_adds_what_is_written_into_its_file() {
    let site = Site::new("revoked: [{cn: a}]\n");
    let mut world = World::new(1);
    world.ok(Op::AddRevocations(AddRevocations {
        revocations: vec![by_cn("earlier")],
    }));
    let cluster = FakeCluster::new(world);
    let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>, site.file.clone()));
    let until = async |wanted: &[&str]| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while revoked(&cluster) != wanted {
            assert!(Instant::now() < deadline, "{wanted:?}: {:?}", revoked(&cluster));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    until(&["cn a", "cn earlier"]).await;
    site.write("revoked: [{cn: b}]\n");
    until(&["cn a", "cn b", "cn earlier"]).await;
    std::fs::remove_file(site.path()).unwrap();
    // A hundred looks at nothing take nothing back, nor does the end of it.
    unrevoke(&cluster, "a");
    until(&["cn b", "cn earlier"]).await;
    site.write("revoked: [{cn: c}]\n");
    until(&["cn b", "cn c", "cn earlier"]).await;
    driver.abort();
}
