use std::io::Write;

use super::*;
use crate::config::LogFormat;

const LONG: Duration = Duration::from_secs(20);

fn logging() -> Logging {
    Logging {
        level: "info".to_owned(),
        format: LogFormat::Json,
        error: LogStream::default(),
        audit: LogStream::default(),
        access: LogStream::default(),
        mirror_audit: false,
        rotation: LogRotation {
            max_bytes: 1 << 20,
            max_backups: 10,
            max_age: Duration::from_secs(86_400),
            compress: true,
        },
    }
}

fn to(folder: &Path, name: &str) -> LogStream {
    LogStream {
        path: Some(folder.join(name)),
        to_stdout: false,
    }
}

fn names<'a>(streams: &'a Streams, target: &str, module: &str) -> Vec<&'a str> {
    let line = streams.line(target, Some(module));
    line.places
        .iter()
        .chain(line.besides)
        .map(LogWriter::name)
        .collect()
}

fn log(streams: &Streams, target: &str, line: &str) {
    let mut writer = streams.line(target, Some("hsm_node::http"));
    writer.write_all(line.as_bytes()).unwrap();
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

#[test]
fn without_a_path_there_is_standard_error_alone_and_no_line_of_a_request() {
    let streams = Streams::open(&logging()).unwrap();
    assert!(streams.all().len() == 1 && !streams.has_access());
    for target in ["hsm_node::app", AUDIT] {
        for module in ["hsm_node::app", "hsm_node::logging"] {
            assert_eq!(names(&streams, target, module), ["standard error"]);
        }
    }
}

#[test]
fn each_kind_of_line_goes_to_its_own_file() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let logging = Logging {
        error: to(folder, "error.log"),
        audit: to(folder, "audit.log"),
        access: to(folder, "access.log"),
        ..logging()
    };
    let streams = Streams::open(&logging).unwrap();
    log(&streams, "hsm_node::app", "started\n");
    log(&streams, AUDIT, "key destroyed\n");
    log(&streams, ACCESS, "request\n");
    streams.finish(None, LONG);
    assert_eq!(read(folder, "error.log"), "started\n");
    assert_eq!(read(folder, "audit.log"), "key destroyed\n");
    assert_eq!(read(folder, "access.log"), "request\n");
}

#[test]
fn what_the_log_says_of_itself_is_on_standard_error_too() {
    let folder = tempfile::tempdir().unwrap();
    let logging = Logging {
        error: to(folder.path(), "error.log"),
        audit: to(folder.path(), "audit.log"),
        ..logging()
    };
    let streams = Streams::open(&logging).unwrap();
    for target in [crate::logging::MODULE, AUDIT] {
        let own = names(&streams, target, "hsm_node::logging::backups");
        assert!(own.len() == 2 && own.contains(&"standard error"), "{own:?}");
    }
    assert_eq!(names(&streams, AUDIT, "hsm_node::admin::audit").len(), 1);
}

#[test]
fn two_keys_may_name_one_file_and_no_line_is_in_it_twice() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let logging = Logging {
        error: to(folder, "node.log"),
        audit: to(&folder.join("."), "node.log"),
        mirror_audit: true,
        ..logging()
    };
    let streams = Streams::open(&logging).unwrap();
    log(&streams, "hsm_node::app", "started\n");
    log(&streams, AUDIT, "key destroyed\n");
    streams.finish(None, LONG);
    assert_eq!(read(folder, "node.log"), "started\nkey destroyed\n");
}

#[test]
fn a_mirrored_audit_is_in_both_files() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let logging = Logging {
        error: to(folder, "error.log"),
        audit: to(folder, "audit.log"),
        mirror_audit: true,
        ..logging()
    };
    let streams = Streams::open(&logging).unwrap();
    log(&streams, AUDIT, "key destroyed\n");
    streams.finish(None, LONG);
    for name in ["error.log", "audit.log"] {
        assert_eq!(read(folder, name), "key destroyed\n");
    }
}

#[test]
fn standard_output_is_beside_a_file_or_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let logging = Logging {
        error: LogStream {
            to_stdout: true,
            ..to(folder.path(), "error.log")
        },
        access: LogStream {
            path: None,
            to_stdout: true,
        },
        ..logging()
    };
    let streams = Streams::open(&logging).unwrap();
    let names = |target| names(&streams, target, "hsm_node::app");
    assert_eq!(names("hsm_node::app").len(), 2);
    assert_eq!(names(ACCESS), ["standard output"]);
    assert_eq!(names(AUDIT), ["standard error"]);
}

/// Hangs until its sender is dropped.
struct Hung(Receiver<()>);

impl Write for Hung {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands on what it takes.
struct Reader(SyncSender<Vec<u8>>);

impl Write for Reader {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_send(bytes.to_vec()).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_last_words_do_not_wait_for_a_disk_that_hangs() {
    let (hangs, until) = sync_channel(0);
    let (to_reader, read) = sync_channel(1);
    let disk = LogWriter::start("disk", Hung(until)).unwrap();
    let stderr = LogWriter::start("standard error", Reader(to_reader)).unwrap();
    let streams = Streams(Arc::new(Inner {
        all: vec![disk.clone(), stderr.clone()],
        rest: vec![disk],
        audit: Vec::new(),
        access: Vec::new(),
        stderr,
        unsaid: AtomicBool::new(false),
    }));
    log(&streams, "hsm_node::app", "hangs\n");
    std::thread::scope(|scope| {
        scope.spawn(|| streams.finish(Some("why"), 3 * LONG));
        assert_eq!(read.recv_timeout(LONG).unwrap(), b"why\n");
        drop(hangs);
    });
}

/// A disk that is full for good.
struct Full;

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(nix::libc::ENOSPC))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has what was lost said `times` times.
fn say_lost(streams: &Streams, times: usize) {
    let lines = tracing_subscriber::fmt().with_writer(streams.clone()).finish();
    tracing::subscriber::with_default(lines, || {
        for _ in 0..times {
            lost::say(streams);
            // Whatever it has cost is counted by then.
            for place in streams.all() {
                place.finish(None, LONG);
            }
        }
    });
}

#[test]
fn what_is_said_of_lost_lines_is_not_counted_where_they_are_lost() {
    let disk = LogWriter::start("error.log", Full).unwrap();
    let audit = LogWriter::start("audit.log", Full).unwrap();
    let (to_reader, read) = sync_channel(100);
    let stderr = LogWriter::start("standard error", Reader(to_reader)).unwrap();
    let streams = Streams(Arc::new(Inner {
        all: vec![disk.clone(), audit.clone(), stderr.clone()],
        rest: vec![disk.clone()],
        audit: vec![audit.clone(), disk.clone()],
        access: Vec::new(),
        stderr,
        unsaid: AtomicBool::new(false),
    }));
    log(&streams, "hsm_node::app", "started\n");
    log(&streams, AUDIT, "key destroyed\n");
    disk.finish(None, LONG);
    audit.finish(None, LONG);
    say_lost(&streams, 3);
    assert_eq!((disk.dropped(), audit.dropped()), (2, 1));
    let said: Vec<String> = read
        .try_iter()
        .map(|line| String::from_utf8(line).unwrap())
        .collect();
    // Lines and audit lines of either place.
    assert_eq!(said.len(), 4, "{said:?}");
}

#[test]
fn what_nobody_has_taken_of_lost_lines_is_said_again() {
    let (hangs, until) = sync_channel(0);
    let stderr = LogWriter::start("standard error", Hung(until)).unwrap();
    let streams = Streams(Arc::new(Inner {
        all: vec![stderr.clone()],
        rest: vec![stderr.clone()],
        audit: vec![stderr.clone()],
        access: Vec::new(),
        stderr: stderr.clone(),
        unsaid: AtomicBool::new(false),
    }));
    while stderr.audit_dropped() == 0 {
        log(&streams, AUDIT, "key destroyed\n");
    }
    let lines = tracing_subscriber::fmt().with_writer(streams.clone()).finish();
    tracing::subscriber::with_default(lines, || {
        for _ in 0..3 {
            lost::say(&streams);
        }
    });
    let lost = stderr.audit_dropped();
    assert_eq!(stderr.more_audit_dropped(), Some(lost), "it is not said yet");
    stderr.say_audit_dropped_again();
    drop(hangs);
    stderr.finish(None, LONG);
    say_lost(&streams, 1);
    assert_eq!(
        (stderr.audit_dropped(), stderr.more_audit_dropped()),
        (lost, None)
    );
}

#[test]
fn a_look_makes_nothing_and_a_refused_path_leaves_the_others_unmade() {
    let folder = tempfile::tempdir().unwrap();
    let mut logging = Logging {
        error: to(folder.path(), "error.log"),
        ..logging()
    };
    check(&logging).unwrap();
    logging.audit = to(folder.path(), "..");
    let error = Streams::open(&logging).err().unwrap().to_string();
    assert!(error.starts_with("config: logging.audit_path: "), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn lines_of_many_threads_stay_whole() {
    const THREADS: usize = 8;
    const LINES: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let logging = Logging {
        access: to(folder.path(), "access.log"),
        rotation: LogRotation {
            max_bytes: 64 << 10,
            max_backups: 1000,
            compress: false,
            ..logging().rotation
        },
        ..logging()
    };
    let streams = Streams::open(&logging).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let streams = &streams;
            scope.spawn(move || {
                let filling = char::from(b'a' + u8::try_from(thread).unwrap())
                    .to_string()
                    .repeat(200);
                for number in 0..LINES {
                    log(streams, ACCESS, &format!("{thread} {number} {filling}\n"));
                }
            });
        }
    });
    streams.finish(None, LONG);
    assert_eq!(streams.all().iter().map(LogWriter::dropped).sum::<u64>(), 0);
    let mut next = [0; THREADS];
    let mut files: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(files.len() > 2, "{files:?}");
    // Backups by their times; `access.log` comes after every `access-…`.
    files.sort();
    for file in files {
        for line in std::fs::read_to_string(file).unwrap().lines() {
            let parts: Vec<&str> = line.split(' ').collect();
            let [thread, number, filling] = parts[..] else {
                panic!("{line}")
            };
            let thread: usize = thread.parse().unwrap();
            assert_eq!(number.parse::<usize>().unwrap(), next[thread], "{line}");
            assert_eq!(filling.len(), 200, "{line}");
            next[thread] += 1;
        }
    }
    assert_eq!(next, [LINES; THREADS]);
}
