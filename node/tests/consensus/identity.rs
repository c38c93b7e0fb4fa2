//! Who may be a member: tokens, authorities, names, wiped and rolled back directories, renewed certificates.

use crate::cluster::*;

#[test]
fn joins_that_must_fail_fail_clearly_and_leave_the_cluster_as_it_was() {
    let mut cluster = Cluster::new(2, 1);
    let (token, ca) = (cluster.token(), cluster.pki.ca_sha256.clone());
    let address = cluster.address(0);
    cluster.start(2);
    let ask = |cluster: &mut Cluster, token: &str, ca: &str| {
        cluster
            .node(2)
            .ask(&format!("join {token} {ca} {address}"), LONG)
            .unwrap_err()
    };
    let wrong = token.replace('7', "8");
    assert!(
        ask(&mut cluster, &wrong, &ca).contains("join token"),
        "wrong secret"
    );
    assert!(ask(&mut cluster, "nonsense", &ca).contains("malformed"));
    assert!(
        ask(&mut cluster, &token, &"00".repeat(32)).contains("cluster.tls.ca_path"),
        "wrong CA pin"
    );

    let config = crate::child::Config {
        trk: 9,
        ..cluster.config(2)
    };
    cluster.start_as(2, &config);
    assert!(ask(&mut cluster, &token, &ca).contains("TOKEN_REPLICATION_KEY"));

    let mut taken = cluster.config(1);
    (taken.dir, taken.listen, taken.advertise) = (cluster.data(2), cluster.address(2), cluster.address(2));
    std::fs::remove_dir_all(cluster.data(2)).unwrap();
    cluster.start_as(2, &taken);
    assert!(
        ask(&mut cluster, &token, &ca).contains("node_id n1"),
        "a name that is taken"
    );

    cluster.kill(2);
    cluster.put("unharmed");
    cluster.converge();
}

pub(crate) fn a_wiped_node_is_refused_under_its_old_identity() {
    let mut cluster = Cluster::new(3, 0);
    let leader = cluster.leader();
    let wiped = (leader + 1) % 3;
    cluster.kill(wiped);
    std::fs::remove_dir_all(cluster.data(wiped)).unwrap();
    cluster.start(wiped);
    let why = cluster.join(wiped).unwrap_err();
    assert!(
        why.contains(&format!("node_id {}", Cluster::name(wiped))),
        "{why}"
    );
    // Nor does the leader's replication reach it: it belongs to no cluster.
    assert_eq!(cluster.stand(wiped).unwrap().role, "uninitialised");
    cluster.put("still-two");
}

pub(crate) fn a_directory_put_back_from_an_older_copy_poisons_itself() {
    let mut cluster = Cluster::new(3, 0);
    let leader = cluster.leader();
    let node = (leader + 1) % 3;
    let copy = cluster.dir.path().join("copy");
    cluster.kill(node);
    copy_dir(&cluster.data(node), &copy);
    cluster.start(node);
    for number in 0..5 {
        cluster.put(&format!("k{number}"));
    }
    cluster.converge();
    // The report that names its index is what the copy falls short of.
    cluster.node(node).ask("report", SHORT).unwrap();
    cluster.kill(node);
    std::fs::remove_dir_all(cluster.data(node)).unwrap();
    copy_dir(&copy, &cluster.data(node));
    cluster.start(node);
    let ended = cluster.node(node).wait_until_ended(LONG);
    assert!(ended, "{:?}", cluster.node(node).said);
    // Read by another thread.
    cluster.wait("what it said last", SHORT, |c| {
        c.node(node).has_said("older copy")
    });
    // And it stays so.
    cluster.start(node);
    assert!(cluster.node(node).has_said("may not run again"));
}

pub(crate) fn a_founders_copy_from_when_it_was_alone_does_not_stay_ready() {
    let mut cluster = Cluster::new(1, 2);
    let copy = cluster.dir.path().join("copy");
    cluster.kill(0);
    copy_dir(&cluster.data(0), &copy);
    cluster.start(0);
    for node in [1, 2] {
        cluster.start(node);
        cluster.join(node).unwrap();
    }
    cluster.kill_all();
    std::fs::remove_dir_all(cluster.data(0)).unwrap();
    copy_dir(&copy, &cluster.data(0));
    for node in 0..3 {
        cluster.start(node);
    }
    // It elects itself: nobody but the others' ids could tell it.
    let greeted = |cluster: &mut Cluster| {
        let view = cluster.node(0).ask("view", SHORT);
        view.is_ok_and(|view| view.contains("OlderCopy"))
    };
    cluster.wait("the others to greet it", LONG, greeted);
    let stand = cluster.stand(0).unwrap();
    assert!(!stand.gate_open && stand.staleness_ms < 0, "{stand:?}");
    let why = cluster.node(0).ask("put lost", SHORT).unwrap_err();
    assert!(why.contains("an older copy"), "{why}");
    // The others go on without it.
    let leader = cluster.leader();
    assert_ne!(leader, 0);
    cluster.node(leader).ask("put kept", SHORT).unwrap();
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_renewed_certificate_does_not_cut_a_node_off() {
    let mut cluster = Cluster::new(3, 0);
    let leader = cluster.leader();
    let node = (leader + 1) % 3;
    cluster.kill(node);
    cluster.pki.issue(&Cluster::name(node));
    cluster.start(node);
    cluster.wait("it is back", LONG, |c| c.stand(node).is_some_and(|s| s.gate_open));
    cluster.put("renewed");
    cluster.converge();
}

#[test]
fn a_certificate_of_another_authority_or_for_another_node_does_not_connect() {
    let mut cluster = Cluster::new(2, 1);
    let foreign = Pki::new(&cluster.dir.path().join("foreign"));
    foreign.issue("n2");
    let mut config = cluster.config(2);
    config.ca = cluster.dir.path().join("foreign/ca.crt");
    config.cert = cluster.dir.path().join("foreign/n2.crt");
    config.key = cluster.dir.path().join("foreign/n2.key");
    cluster.start_as(2, &config);
    let (token, address) = (cluster.token(), cluster.address(0));
    let command = format!("join {token} {} {address}", foreign.ca_sha256);
    let why = cluster.node(2).ask(&command, LONG).unwrap_err();
    assert!(
        why.contains(&address) && !why.contains("node_id"),
        "TLS itself refuses: {why}"
    );
    cluster.put("unharmed");
}
