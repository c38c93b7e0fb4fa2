//! One damaged file of a token, and the slot opened on it: every key works, or the slot says why it does not. Each time in a
//! process of its own, because SoftHSM may end the one that it reads a damaged file in.
//!
//! What would make this fail: without `prove` in the import of a key that is held, one with a flipped bit in its value calls a
//! good ciphertext a wrong one, and what it encrypts the undamaged key does not open; without the setting aside of absurd
//! files a process ends with status 5; with a node key or transport key that is not compared, another one passes for it.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hsm_core::names::TransportId;
use hsm_core::{KekUse, Module, OpError, Slot, SlotOptions, TRANSPORT_CHECK_LEN};

use crate::adopt;
use crate::harness::{MODULE, Sandbox};
use crate::keys::Kek;
use crate::objects::beside;

/// How often each file is damaged in each of two ways.
const ROUNDS: &str = "HSM_TOKEN_OBJECT_ROUNDS";
const USUAL_ROUNDS: u32 = 5;
const SEED: u64 = 0x5eed_0b1e_c7f1_1e55;

const LABEL: &str = "slot-a";
const NOTED: &str = "noted";
/// What a look at a damaged token writes: [`WHOLE`], or what was refused and why.
const OUTCOME: &str = "outcome";
const WHOLE: &str = "whole";
/// If it is there, a token without a node key gets one; it takes seconds.
const MAKES_NODE_KEY: &str = "makes-node-key";
const NEW_TEXT: &[u8] = b"encrypted by the damaged token";
const OLD_TEXTS: [&[u8]; 2] = [b"4111 1111 1111 1111", &[0x5a; 1000]];
const V1_TEXT: &[u8] = b"encrypted by version 1";
/// No slow machine misses it: a deadline that is over would count as a refusal.
const PATIENT: Duration = Duration::from_secs(30);

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit.max(1) as u64) as usize
    }
}

/// The object files of the token, each with what it holds.
struct Files<'a> {
    sandbox: &'a Sandbox,
    known: Vec<(String, &'static str)>,
}

impl Files<'_> {
    /// One has come since, which holds this.
    fn came(&mut self, what: &'static str) {
        let mut new: Vec<String> = Vec::new();
        for path in self.sandbox.object_files() {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if self.known.iter().all(|(known, _)| *known != name) {
                new.push(name);
            }
        }
        assert_eq!(new.len(), 1, "{what}: {new:?}");
        self.known.extend(new.into_iter().map(|name| (name, what)));
    }

    fn save(&self, path: &Path) {
        let lines = self.known.iter().map(|(name, what)| format!("{name} {what}\n"));
        fs::write(path, lines.collect::<String>()).unwrap();
    }
}

/// What is known of the token from when it was whole.
struct Noted {
    node_key: Vec<u8>,
    check: [u8; TRANSPORT_CHECK_LEN],
    /// A transport key that the token has been granted and has not taken yet.
    second: TransportId,
    second_grant: Vec<u8>,
    second_check: [u8; TRANSPORT_CHECK_LEN],
    /// With what was encrypted of [`OLD_TEXTS`] under each.
    keks: Vec<(Kek, Vec<Vec<u8>>)>,
    /// A key that has not been imported yet.
    spare: Kek,
    adopted_record: Vec<u8>,
}

/// Versions of the KEKs in the token. Version 1's label is that of the key that is adopted.
const VERSIONS: [u32; 2] = [2, 3];
const SPARE_VERSION: u32 = 4;

impl Noted {
    fn read(dir: &Path) -> Self {
        let read = |name: &str| fs::read(dir.join(name)).unwrap();
        let keks = VERSIONS.map(|version| {
            let kek = Kek::saved(&dir.join(format!("kek-{version}")));
            let sealed = (0..OLD_TEXTS.len()).map(|text| read(&format!("sealed-{version}-{text}")));
            (kek, sealed.collect::<Vec<_>>())
        });
        Self {
            node_key: read("node-key"),
            check: read("check").try_into().unwrap(),
            second: TransportId::from_slice(&read("second")).unwrap(),
            second_grant: read("second-grant"),
            second_check: read("second-check").try_into().unwrap(),
            keks: keks.into(),
            spare: Kek::saved(&dir.join("spare")),
            adopted_record: read("adopted-record"),
        }
    }
}

/// Phase: a token with one of each kind of object that a node keeps, two KEKs of them, and what is known of it.
pub(crate) fn make(sandbox: &Sandbox) {
    let noted = sandbox.path(NOTED);
    fs::create_dir(&noted).unwrap();
    let note = |name: &str, bytes: &[u8]| fs::write(noted.join(name), bytes).unwrap();
    let slot = sandbox.new_slot(LABEL);
    let mut files = Files {
        sandbox,
        known: vec![("token.object".to_owned(), "the token's own file")],
    };

    let node_key = slot.node_key().unwrap();
    files.came("node key");
    note("node-key", &node_key);
    let transport = TransportId::random().unwrap();
    note("check", &slot.create_transport_key(transport).unwrap());
    files.came("transport key");
    for version in VERSIONS {
        let kek = Kek::generate(&slot, transport, version);
        kek.import(&slot).unwrap();
        files.came("KEK");
        slot.load_kek(kek.uid, KekUse::EncryptDecrypt).unwrap();
        for (number, text) in OLD_TEXTS.iter().enumerate() {
            let sealed = kek.encrypt(&slot, text).unwrap();
            note(&format!("sealed-{version}-{number}"), &sealed);
        }
        kek.save(&noted.join(format!("kek-{version}")));
    }
    Kek::generate(&slot, transport, SPARE_VERSION).save(&noted.join("spare"));

    let offered = slot.offer_transport_key(&[node_key]).unwrap();
    let grant = offered.grants.into_iter().next().unwrap().unwrap();
    note("second", TransportId::random().unwrap().as_bytes());
    note("second-grant", &grant);
    note("second-check", &offered.check);

    adopt::v1_key(&beside(&slot), adopt::LABEL, &adopt::KEY, &[]);
    files.came("key of version 1");
    let record = slot.v1_check_record(&adopt::kek(), None).unwrap();
    slot.adopt_kek(&adopt::kek(), &record, false).unwrap();
    files.came("copy of the key of version 1");
    note("adopted-record", &record);
    files.save(&noted.join("files"));
}

/// What the damaged token does not do, and why.
#[derive(Default)]
struct Refused(Vec<String>);

impl Refused {
    fn push(&mut self, what: &str, why: impl Display) {
        let why = why.to_string();
        assert!(!why.trim().is_empty(), "{what} was refused without a reason");
        self.0.push(format!("{what}: {why}"));
    }

    /// What came of it, unless it was refused.
    fn unless<T>(&mut self, what: &str, outcome: Result<T, impl Display>) -> Option<T> {
        match outcome {
            Ok(value) => Some(value),
            Err(why) => {
                self.push(what, why);
                None
            }
        }
    }
}

fn open(sandbox: &Sandbox) -> Result<Slot, String> {
    let module = Module::load(Path::new(MODULE)).map_err(|error| error.to_string())?;
    let options = SlotOptions {
        deadline: PATIENT,
        control_deadline: PATIENT,
        ..sandbox.options(LABEL)
    };
    Slot::open(&module, options).map_err(|error| error.to_string())
}

/// Helper: looks at a token as a node looks at its own, and uses everything in it. Says what was refused; ends otherwise than
/// well if something is not as it was and nothing says so. The label of a key and the token's serial number are for people, and
/// may differ.
pub(crate) fn look(sandbox: &Sandbox) {
    let noted = Noted::read(&sandbox.path(NOTED));
    let mut refused = Refused::default();
    if let Some(slot) = refused.unless("opening", open(sandbox)) {
        refused.unless("torn objects", slot.remove_torn_objects());
        refused.unless("inventory", slot.objects());
        look_at_node_key(sandbox, &slot, &noted, &mut refused);
        look_at_transport_key(&slot, &noted, &mut refused);
        for (kek, sealed) in &noted.keks {
            if let Some(made) = look_at_kek(&slot, kek, sealed, &mut refused) {
                fs::write(sandbox.path(&made_under(kek)), made).unwrap();
            }
        }
        look_at_adopted(&slot, &noted, &mut refused);
    }
    let outcome = match refused.0.as_slice() {
        [] => WHOLE.to_owned(),
        refused => refused.join("\n"),
    };
    fs::write(sandbox.path(OUTCOME), outcome).unwrap();
}

/// File of what was encrypted on a damaged token, which the undamaged one has to open.
fn made_under(kek: &Kek) -> String {
    format!("made-{}", kek.version)
}

fn look_at_node_key(sandbox: &Sandbox, slot: &Slot, noted: &Noted, refused: &mut Refused) {
    match refused.unless("node key", slot.find_node_key()) {
        // Whoever compares sees it, and a node does so before it uses anything.
        Some(Some(found)) if found != noted.node_key => {
            refused.push("node key", "another one than was noted");
        }
        Some(None) => {
            refused.push("node key", "not in the token");
            if sandbox.path(MAKES_NODE_KEY).exists() {
                let made = slot.node_key().unwrap();
                assert!(made != noted.node_key, "a new node key passes for the lost one");
            }
        }
        Some(Some(_)) | None => {}
    }
    // The private half.
    let accepted = slot.accept_transport_key(noted.second, &noted.second_grant, &noted.second_check);
    if refused.unless("grant", accepted).is_some() {
        let check = refused.unless("granted transport key", slot.transport_check(noted.second));
        assert!(
            check.is_none_or(|check| check == Some(noted.second_check)),
            "another transport key was taken for the granted one"
        );
    }
}

fn look_at_transport_key(slot: &Slot, noted: &Noted, refused: &mut Refused) {
    let id = noted.spare.transport;
    match refused.unless("transport key", slot.transport_check(id)) {
        Some(Some(check)) if check == noted.check => {
            refused.unless("import", noted.spare.import(slot));
        }
        Some(Some(_)) => {
            // It must not pass for the committed one.
            let error = slot
                .accept_transport_key(id, &noted.second_grant, &noted.check)
                .unwrap_err();
            refused.push("transport key", error);
        }
        Some(None) => refused.push("transport key", "not in the token"),
        None => {}
    }
}

/// Proves it by its check record, loads it, opens what it has to open; only a proven one encrypts, as on a node. What it has
/// encrypted, if it does.
fn look_at_kek(slot: &Slot, kek: &Kek, sealed: &[Vec<u8>], refused: &mut Refused) -> Option<Vec<u8>> {
    let what = format!("KEK version {}", kek.version);
    // With nothing to import if it is missing.
    let held = Kek {
        wrapped: Vec::new(),
        ..kek.clone()
    };
    let proven = refused.unless(&what, held.import(slot)).is_some();
    refused.unless(&what, slot.load_kek(kek.uid, KekUse::EncryptDecrypt));
    for (text, ciphertext) in OLD_TEXTS.iter().zip(sealed) {
        judge(&what, kek.decrypt(slot, ciphertext), text, proven, refused);
    }
    if !proven {
        return None;
    }
    refused.unless(&what, kek.encrypt(slot, NEW_TEXT))
}

fn look_at_adopted(slot: &Slot, noted: &Noted, refused: &mut Refused) {
    let (what, kek) = ("adopted key", adopt::kek());
    let proof = slot.prove_adopted_kek(&kek, &noted.adopted_record);
    let proven = refused.unless(what, proof).is_some();
    refused.unless(what, slot.load_kek(kek.key_uid, KekUse::DecryptOnly));
    let opened = adopt::open(slot, &kek, adopt::sealed(&adopt::KEY, V1_TEXT));
    judge(what, opened, V1_TEXT, proven, refused);
}

/// A ciphertext gives what was encrypted or is refused, and the ciphertext is not blamed for what became of the key.
fn judge(what: &str, opened: Result<Vec<u8>, OpError>, text: &[u8], proven: bool, refused: &mut Refused) {
    match opened {
        Ok(opened) => assert!(opened == text, "{what}: opened as something else"),
        Err(error) => {
            let blamed = proven && error == OpError::AuthenticationFailed;
            assert!(!blamed, "{what}: proven, and calls a good ciphertext a wrong one");
            refused.push(what, error);
        }
    }
}

/// Attributes of SoftHSM's files: the user PIN's blob in `token.object`, and `CKA_MODULUS`.
const USER_PIN: u64 = 0x8000_534d;
const MODULUS: u64 = 0x120;

/// Flips a bit of this attribute, at a place that follows from its length: type(8) kind(8) length(8) bytes.
fn flip(file: &Path, attribute: u64, place: impl Fn(usize) -> usize, bit: usize) {
    let contents = fs::read(file).unwrap();
    let header = [attribute.to_be_bytes(), 3_u64.to_be_bytes()].concat();
    let at = contents.windows(16).position(|window| window == header).unwrap();
    let length = u64::from_be_bytes(*contents[at + 16..].first_chunk().unwrap());
    let byte = at + place(usize::try_from(length).unwrap());
    Damage::Flipped { byte, bit }.do_to(file);
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Flipped { byte: usize, bit: usize },
    CutTo(usize),
}

impl Damage {
    fn do_to(self, file: &Path) {
        let mut contents = fs::read(file).unwrap();
        match self {
            Self::Flipped { byte, bit } => contents[byte] ^= 1 << bit,
            Self::CutTo(length) => contents.truncate(length),
        }
        fs::write(file, contents).unwrap();
    }
}

#[derive(Default)]
struct Tally {
    whole: u32,
    refused: u32,
}

impl Tally {
    fn count(&mut self, refused: Option<&String>) {
        match refused {
            None => self.whole += 1,
            Some(_) => self.refused += 1,
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let place = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &place);
        } else {
            fs::copy(entry.path(), place).unwrap();
        }
    }
}

struct Bench {
    /// The tokens as they were when the slot was closed.
    whole: PathBuf,
    /// Where they are damaged and looked at.
    round: Sandbox,
    /// The damaged token's folder.
    place: PathBuf,
    noted: Noted,
    /// On the undamaged token, its KEKs loaded.
    undamaged: Slot,
}

impl Bench {
    fn new(sandbox: &Sandbox) -> Self {
        let whole = sandbox.path("whole");
        copy(&sandbox.path("tokens"), &whole);
        let round = sandbox.within("round");
        copy(&sandbox.path(NOTED), &round.path(NOTED));
        let pin = format!("pin-{LABEL}");
        fs::copy(sandbox.path(&pin), round.path(&pin)).unwrap();
        let folder = sandbox.token_dir().file_name().unwrap().to_owned();
        let undamaged = open(sandbox).unwrap_or_else(|error| panic!("{error}"));
        let noted = Noted::read(&sandbox.path(NOTED));
        for (kek, _) in &noted.keks {
            undamaged.load_kek(kek.uid, KekUse::DecryptOnly).unwrap();
        }
        Self {
            whole,
            place: round.path("tokens").join(folder),
            round,
            noted,
            undamaged,
        }
    }

    /// What is refused once this damage is done to the token's folder; `None` if nothing is.
    fn outcome(&self, told: &str, damage: impl FnOnce(&Path)) -> Option<String> {
        // A slot that was refused its PIN has noted that beside the token.
        for name in ["tokens".to_owned(), format!("state-{LABEL}")] {
            let place = self.round.path(&name);
            if place.exists() {
                fs::remove_dir_all(place).unwrap();
            }
        }
        copy(&self.whole, &self.round.path("tokens"));
        let made = self.noted.keks.iter().map(|(kek, _)| made_under(kek));
        for name in made.chain([OUTCOME.to_owned()]) {
            let file = self.round.path(&name);
            if file.exists() {
                fs::remove_file(file).unwrap();
            }
        }

        damage(&self.place);
        let ended = self.round.helper("look_at_damaged_token").ended();
        let ended = ended.unwrap_or_else(|| panic!("{told}: it hung"));
        assert!(ended.success(), "{told}: it ended with {ended}");
        for (kek, _) in &self.noted.keks {
            if let Ok(made) = fs::read(self.round.path(&made_under(kek))) {
                let opened = kek.decrypt(&self.undamaged, &made);
                assert_eq!(
                    opened.as_deref(),
                    Ok(NEW_TEXT),
                    "{told}: encrypted under another key than version {}",
                    kek.version
                );
            }
        }
        let said = fs::read_to_string(self.round.path(OUTCOME)).unwrap_or_default();
        assert!(!said.trim().is_empty(), "{told}: it says nothing");
        (said != WHOLE).then_some(said)
    }
}

/// Phase: damages each file of the token, again and again, and looks at it each time.
pub(crate) fn each_file(sandbox: &Sandbox) {
    let rounds = std::env::var(ROUNDS).map_or(USUAL_ROUNDS, |text| text.parse().unwrap());
    let bench = Bench::new(sandbox);
    let undamaged = bench.outcome("nothing is damaged", |_| ());
    assert_eq!(undamaged, None, "nothing is damaged");

    let files = fs::read_to_string(sandbox.path(NOTED).join("files")).unwrap();
    let files: Vec<(&str, &str)> = files.lines().map(|line| line.split_once(' ').unwrap()).collect();
    let (node_key, _) = files.iter().find(|(_, what)| *what == "node key").unwrap();
    let makes = bench.round.path(MAKES_NODE_KEY);
    fs::write(&makes, "").unwrap();
    let lost = bench.outcome("the node key is lost", |folder| {
        fs::remove_file(folder.join(node_key)).unwrap();
    });
    let lost = lost.expect("a lost node key is noticed");
    assert!(lost.contains("node key: not in the token"), "{lost}");
    fs::remove_file(makes).unwrap();

    // What has ended the process once, whatever is drawn.
    let token_object = bench.outcome("the user PIN's blob is taken for a label", |folder| {
        flip(&folder.join("token.object"), USER_PIN, |_| 7, 2);
    });
    assert_eq!(token_object, None, "made anew from its copy");
    let modulus = bench.outcome("the node key's modulus does not decrypt", |folder| {
        flip(&folder.join(node_key), MODULUS, |length| 24 + length - 1, 0);
    });
    let modulus = modulus.expect("a node key without a modulus is noticed");
    assert!(modulus.contains("node key"), "{modulus}");

    println!("each file of a token {rounds} times flipped and {rounds} times cut, seed {SEED:#x}");
    let mut random = Random(SEED);
    let mut all = Tally::default();
    let folder = bench.whole.join(bench.place.file_name().unwrap());
    for (name, what) in files {
        let length = fs::read(folder.join(name)).unwrap().len();
        let (mut flips, mut cuts) = (Tally::default(), Tally::default());
        for _ in 0..rounds {
            let (byte, bit) = (random.below(length), random.below(8));
            let cut = Damage::CutTo(random.below(length));
            for (damage, tally) in [(Damage::Flipped { byte, bit }, &mut flips), (cut, &mut cuts)] {
                let told = format!("{what}, {length} bytes, {damage:?}, seed {SEED:#x}");
                let refused = bench.outcome(&told, |folder| damage.do_to(&folder.join(name)));
                tally.count(refused.as_ref());
                all.count(refused.as_ref());
            }
        }
        println!(
            "{what} ({length} bytes): flipped {} whole, {} refused; cut {} whole, {} refused",
            flips.whole, flips.refused, cuts.whole, cuts.refused
        );
    }
    println!("in all {} whole, {} refused", all.whole, all.refused);
    // A cut in the token's own file is mended from its copy, and one in a key is not.
    assert!(rounds == 0 || (all.whole > 0 && all.refused > 0));
}
