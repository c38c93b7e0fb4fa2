//! What sled says and does beside its answers: heard, and fatal, once a store is open.

use std::process::{Command, Output};
use std::thread;

use raft_store::storage::{install_log_hook, install_panic_hook};

use crate::common::*;

const ROLE: &str = "STORE_WATCH_ROLE";

/// Runs the child test in a process of its own: hooks are the process's.
fn child(role: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "watch::child_with_hooks_of_its_own",
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(ROLE, role)
        .output()
        .unwrap()
}

struct Deaf;

impl log::Log for Deaf {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        false
    }
    fn log(&self, _: &log::Record<'_>) {}
    fn flush(&self) {}
}

/// Whether a thread of this name that panics was survived: it does not return otherwise.
fn panic_in(name: &str) {
    let panicking = thread::Builder::new().name(name.into());
    let ended = panicking.spawn(|| panic!("a test's own")).unwrap().join();
    assert!(ended.is_err());
    println!("survived {name}");
}

#[test]
fn child_with_hooks_of_its_own() {
    match std::env::var(ROLE).as_deref() {
        Ok("another logger") => {
            log::set_logger(&Deaf).unwrap();
            let refused = install_log_hook(|_| {}).unwrap_err().to_string();
            assert!(refused.contains("another logger"), "{refused}");
            println!("refused");
        }
        Ok("panics") => {
            install_panic_hook(|why| {
                eprintln!("fatal: {why}");
                std::process::exit(70);
            });
            let dir = tempfile::tempdir().unwrap();
            panic_in("log flusher");
            let _store = open(dir.path());
            panic_in("request");
            panic_in("sled-io-3");
        }
        _ => {}
    }
}

#[test]
fn a_logger_that_is_not_the_stores_is_an_error() {
    let output = child("another logger");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("refused"), "{said}");
}

#[test]
fn a_panic_of_a_thread_that_the_store_rests_on_ends_the_process_once_it_is_open() {
    let output = child("panics");
    let (said, why) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert_eq!(output.status.code(), Some(70), "{said}{why}");
    assert!(
        said.contains("survived log flusher"),
        "before the store was open: {said}"
    );
    assert!(said.contains("survived request"), "{said}");
    assert!(!said.contains("survived sled-io-3"), "{said}");
    assert!(
        why.contains("fatal: thread \"sled-io-3\"") && why.contains("a test's own"),
        "{why}"
    );
}

#[test]
fn an_error_record_of_sled_is_fatal_once_a_store_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let _store = open(dir.path());
    log::error!(target: "sled::flusher", "failed to flush: planted by a test");
    let said = fatal().lock().unwrap().clone();
    assert!(
        said.iter().any(|why| why.contains("planted by a test")),
        "{said:?}"
    );
}

#[test]
fn a_refusal_tells_what_sled_said_of_its_files() {
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        drop(open(dir.path()));
        closed(dir.path());
    }
    let sled = std::fs::read_dir(dir.path().join("sled")).unwrap();
    let snapshot = sled
        .map(|file| file.unwrap().path())
        .find(|path| path.to_string_lossy().contains("/snap."))
        .unwrap();
    flip_bit(&snapshot, 0);
    let why = try_open(dir.path()).err().unwrap().to_string();
    assert!(
        why.contains("sled said: corrupt snapshot file") && why.contains(REMEDY),
        "{why}"
    );
}
