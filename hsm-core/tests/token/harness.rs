//! Runs a test's phases as child processes with a SoftHSM configuration of their own, and gives
//! each the token, PINs and directories that the phases share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hsm_core::secrets::Pin;
use hsm_core::{InitToken, Module, Slot, SlotError, SlotOptions, TokenInfo, generate_pin, init_token};

pub(crate) const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// A module between a slot and SoftHSM, in the sandbox of a test that has built one.
pub(crate) const SHIM: &str = "shim.so";
const DIR: &str = "HSM_CORE_TEST_DIR";
const PHASE: &str = "HSM_CORE_TEST_PHASE";
const HELPER: &str = "HSM_CORE_TEST_HELPER";
const LIMIT: Duration = Duration::from_secs(100);
/// Of a phase that takes as long as a variable says; whatever in it can hang has a limit of its own.
const LONG: Duration = Duration::from_secs(24 * 60 * 60);
/// Between two looks whether this machine runs anybody, how late one may be, and how often a test may be that met it.
const LOOK: Duration = Duration::from_millis(10);
const STOOD_STILL: Duration = Duration::from_millis(150);
const ROUNDS: usize = 4;

/// The directory that the phases of one test share.
pub(crate) struct Sandbox {
    root: PathBuf,
}

/// Runs each phase in a process of its own, one after the other.
pub(crate) fn scenario(name: &str, phases: &[fn(&Sandbox)]) {
    if !is_phase(phases)
        && let Err(said) = run(name, phases, LIMIT)
    {
        panic!("{said}");
    }
}

/// The same, of phases that take as long as a variable says. What they said is printed.
pub(crate) fn long_scenario(name: &str, phases: &[fn(&Sandbox)]) {
    if !is_phase(phases) {
        let said = run(name, phases, LONG).unwrap_or_else(|said| panic!("{said}"));
        print!("{said}");
    }
}

/// The same, of phases in which calls have deadlines, of which a machine that stands still takes a part: what has failed
/// while it did begins anew.
pub(crate) fn scenario_by_the_clock(name: &str, phases: &[fn(&Sandbox)]) {
    if is_phase(phases) {
        return;
    }
    for round in 1..=ROUNDS {
        let machine = Machine::watch();
        let outcome = run(name, phases, LIMIT);
        let late = machine.most_late();
        let Err(said) = outcome else { return };
        assert!(round < ROUNDS && late > STOOD_STILL, "{said}");
        eprintln!("{name} begins anew: the machine stood still for {late:?}\n{said}");
    }
}

/// How late whoever wants to run was run at most; on each core, as far as they are spread.
struct Machine {
    lookers: Vec<std::thread::JoinHandle<Duration>>,
    over: Arc<AtomicBool>,
}

impl Machine {
    fn watch() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let look = |over: Arc<AtomicBool>| {
            let mut most = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                let began = Instant::now();
                std::thread::sleep(LOOK);
                most = most.max(began.elapsed().saturating_sub(LOOK));
            }
            most
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let lookers = (0..cores).map(|_| {
            let over = Arc::clone(&over);
            std::thread::spawn(move || look(over))
        });
        Self {
            lookers: lookers.collect(),
            over,
        }
    }

    fn most_late(self) -> Duration {
        self.over.store(true, Ordering::Relaxed);
        let most = self.lookers.into_iter().map(|looker| looker.join().unwrap());
        most.max().unwrap_or_default()
    }
}

/// Does the phase that this process was started for, if it was started for one.
fn is_phase(phases: &[fn(&Sandbox)]) -> bool {
    if let Some(root) = std::env::var_os(DIR) {
        let phase: usize = std::env::var(PHASE).unwrap().parse().unwrap();
        let sandbox = Sandbox {
            root: PathBuf::from(root),
        };
        phases[phase](&sandbox);
        // A child whose filter matched nothing would succeed as well.
        fs::write(sandbox.root.join(format!("done-{phase}")), "").unwrap();
        return true;
    }
    false
}

/// Makes the place of its tokens, and the configuration that says so.
fn furnish(root: &Path) {
    let tokens = root.join("tokens");
    fs::create_dir(&tokens).unwrap();
    fs::write(
        root.join("softhsm2.conf"),
        format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
            tokens.display()
        ),
    )
    .unwrap();
}

/// What the phases said; an error is what one that has failed said.
fn run(name: &str, phases: &[fn(&Sandbox)], limit: Duration) -> Result<String, String> {
    let dir = tempfile::tempdir().unwrap();
    furnish(dir.path());
    let mut said = String::new();
    for phase in 0..phases.len() {
        let log = dir.path().join("output");
        let output = fs::File::create(&log).unwrap();
        let mut command = again(name, dir.path());
        command
            .env(PHASE, phase.to_string())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        let mut child = command.spawn().unwrap();
        let succeeded = wait(&mut child, limit).is_some_and(|status| status.success());
        let output = fs::read_to_string(&log).unwrap_or_default();
        if !succeeded {
            return Err(format!("phase {phase} of {name} failed:\n{output}"));
        }
        assert!(
            dir.path().join(format!("done-{phase}")).exists(),
            "phase {phase} of {name} did not run:\n{output}"
        );
        said.push_str(&output);
    }
    Ok(said)
}

/// This test binary again, with one test.
fn again(test: &str, root: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env("SOFTHSM2_CONF", root.join("softhsm2.conf"))
        .env(DIR, root)
        .stdin(Stdio::null());
    command
}

/// How it ended; `None` if it was killed because it had not within this time.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if began.elapsed() > limit {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A helper process; killed when dropped.
pub(crate) struct Helper(Child);

impl Helper {
    /// Kills it with SIGKILL, whatever it does.
    pub(crate) fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub(crate) fn succeeds(self) -> bool {
        self.ended().is_some_and(|status| status.success())
    }

    /// How it ended; `None` if it hung and was killed.
    pub(crate) fn ended(mut self) -> Option<ExitStatus> {
        wait(&mut self.0, LIMIT)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a child process can be asked to do, by name.
pub(crate) type Task<'a> = (&'a str, fn(&Sandbox));

/// The body of the test `helper`: does nothing unless started by [`Sandbox::helper`].
pub(crate) fn run_helper(helpers: &[Task<'_>]) {
    let Ok(wanted) = std::env::var(HELPER) else { return };
    let sandbox = Sandbox {
        root: PathBuf::from(std::env::var_os(DIR).unwrap()),
    };
    let (_, helper) = helpers
        .iter()
        .find(|(name, _)| *name == wanted)
        .expect("a known helper");
    helper(&sandbox);
}

/// Waits for a condition, with a deadline.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Sandbox {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// A new directory in this one, for tokens and processes of its own.
    pub(crate) fn within(&self, name: &str) -> Self {
        let root = self.path(name);
        fs::create_dir(&root).unwrap();
        furnish(&root);
        Self { root }
    }

    pub(crate) fn module(&self) -> Arc<Module> {
        let shim = self.path(SHIM);
        let path = if shim.exists() {
            shim.as_path()
        } else {
            Path::new(MODULE)
        };
        Module::load(path).unwrap()
    }

    /// The user PIN of a token, the same in every phase.
    pub(crate) fn pin(&self, label: &str) -> Pin {
        self.kept_pin(&format!("pin-{label}"))
    }

    pub(crate) fn so_pin(&self, label: &str) -> Pin {
        self.kept_pin(&format!("so-pin-{label}"))
    }

    fn kept_pin(&self, name: &str) -> Pin {
        let path = self.path(name);
        if !path.exists() {
            fs::write(&path, generate_pin().unwrap().expose()).unwrap();
        }
        Pin::new(fs::read_to_string(path).unwrap())
    }

    pub(crate) fn init(&self, label: &str) -> TokenInfo {
        let (pin, so_pin) = (self.pin(label), self.so_pin(label));
        let init = InitToken {
            label,
            pin: &pin,
            so_pin: &so_pin,
            destroy_existing: false,
        };
        init_token(&self.module(), init).unwrap()
    }

    pub(crate) fn options(&self, label: &str) -> SlotOptions {
        SlotOptions::new(
            "test",
            label,
            self.pin(label),
            self.path(&format!("state-{label}")),
        )
    }

    pub(crate) fn try_open(&self, label: &str) -> Result<Slot, SlotError> {
        Slot::open(&self.module(), self.options(label))
    }

    pub(crate) fn open(&self, label: &str) -> Slot {
        match self.try_open(label) {
            Ok(slot) => slot,
            Err(error) => panic!("{error}"),
        }
    }

    /// Makes a token and opens it.
    pub(crate) fn new_slot(&self, label: &str) -> Slot {
        self.init(label);
        self.open(label)
    }

    /// The directory of the only token.
    pub(crate) fn token_dir(&self) -> PathBuf {
        let dirs: Vec<PathBuf> = fs::read_dir(self.path("tokens"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .collect();
        assert_eq!(dirs.len(), 1, "{dirs:?}");
        dirs[0].clone()
    }

    /// Names of the object files in the only token.
    pub(crate) fn object_files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = fs::read_dir(self.token_dir())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|ext| ext == "object"))
            .filter(|path| path.file_name().unwrap() != "token.object")
            .collect();
        files.sort();
        files
    }

    /// Starts a helper in a process of its own, on the same tokens.
    pub(crate) fn helper(&self, name: &str) -> Helper {
        Helper(
            again("helper", &self.root)
                .env(HELPER, name)
                .stdout(Stdio::null())
                .spawn()
                .unwrap(),
        )
    }
}
