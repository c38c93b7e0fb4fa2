//! Batches, rewrapping and data keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use hsm_core::envelope::{Binding, Header, Purpose, aad_v1};
use hsm_core::names::KeyUid;
use hsm_core::test_support::import_test_key;
use hsm_core::{
    Ciphertext, DataKeyJob, DataKeySize, DecryptJob, DecryptV1Job, KekUse, OpError, Output, RewrapJob, Slot,
    SlotState, Work, batch_wait,
};

use crate::harness::{Sandbox, eventually};
use crate::keys::{CONTEXT, Kek, decrypt};

const PATIENCE: Duration = Duration::from_secs(60);

type Outcomes = Vec<Result<Output, OpError>>;

fn run_batch(slot: &Slot, works: Vec<Work>) -> Outcomes {
    let answer = start_batch(slot, works);
    answer.recv_timeout(PATIENCE).expect("an answer")
}

fn start_batch(slot: &Slot, works: Vec<Work>) -> Receiver<Outcomes> {
    start_batch_until(slot, works, None)
}

fn start_batch_until(slot: &Slot, works: Vec<Work>, until: Option<Instant>) -> Receiver<Outcomes> {
    let (send, receive) = channel();
    slot.run_batch(
        works,
        until,
        Box::new(move |outcomes| send.send(outcomes).unwrap()),
    )
    .unwrap();
    receive
}

fn run(slot: &Slot, work: Work) -> Result<Output, OpError> {
    run_until(slot, work, None)
}

fn run_until(slot: &Slot, work: Work, until: Option<Instant>) -> Result<Output, OpError> {
    let (send, receive) = channel();
    slot.run(work, until, Box::new(move |outcome| send.send(outcome).unwrap()))?;
    receive.recv_timeout(PATIENCE).expect("an answer")
}

fn envelope(outcome: Result<Output, OpError>) -> Vec<u8> {
    match outcome {
        Ok(Output::Envelope(envelope)) => envelope,
        Ok(_) => panic!("something else than an envelope"),
        Err(error) => panic!("{error}"),
    }
}

fn plaintext(outcome: &Result<Output, OpError>) -> &[u8] {
    match outcome {
        Ok(Output::Plaintext(plaintext)) => plaintext.as_slice(),
        Ok(_) => panic!("something else than a plaintext"),
        Err(error) => panic!("{error}"),
    }
}

/// As a node would ask, which takes the header from the ciphertext.
fn opening(ciphertext: &[u8], principal: &str) -> DecryptJob {
    DecryptJob {
        header: Header::parse(ciphertext).unwrap().0,
        ciphertext: ciphertext.to_vec(),
        context: CONTEXT.into(),
        binding_value: principal.into(),
        aad: b"order 17".to_vec(),
    }
}

/// Another version, in the same token.
fn second_version(slot: &Slot, first: &Kek) -> Kek {
    let second = Kek::generate(slot, first.transport, 2);
    second.import(slot).unwrap();
    slot.load_kek(second.uid, KekUse::EncryptDecrypt).unwrap();
    second
}

pub(crate) fn order_and_neighbours(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let (kek, other) = (Kek::new(&slot), Kek::new(&slot));
    slot.unload_kek(other.uid).unwrap();
    let texts: Vec<Vec<u8>> = (0..1000_u32).map(|n| n.to_be_bytes().to_vec()).collect();
    let works = texts.iter().map(|text| Work::Encrypt(kek.encrypt_job(text)));
    let outcomes = run_batch(&slot, works.collect());
    let sealed: Vec<Vec<u8>> = outcomes.into_iter().map(envelope).collect();
    assert_eq!(sealed.len(), texts.len());

    // Every fourth item is bad in one of four ways.
    let works = sealed.iter().enumerate().map(|(n, ciphertext)| {
        let mut job = opening(ciphertext, "trading-1");
        match n % 16 {
            0 => *job.ciphertext.last_mut().unwrap() ^= 1,
            4 => job.ciphertext.truncate(50),
            8 => job.header.version = 9,
            12 => return Work::Encrypt(other.encrypt_job(b"under a key that is not loaded")),
            _ => {}
        }
        Work::DecryptV2(job)
    });
    let outcomes = run_batch(&slot, works.collect());
    assert_eq!(outcomes.len(), texts.len());
    for (n, outcome) in outcomes.iter().enumerate() {
        let error = outcome.as_ref().err();
        match n % 16 {
            0 | 8 => assert_eq!(error, Some(&OpError::AuthenticationFailed), "{n}"),
            4 => assert_eq!(error, Some(&OpError::TooShort), "{n}"),
            12 => assert_eq!(error, Some(&OpError::KeyNotLoaded), "{n}"),
            _ => assert_eq!(plaintext(outcome), texts[n], "{n}"),
        }
    }
    // More bad items than a thread has sessions to give up: none of them left an operation active.
    assert_eq!(slot.state(), SlotState::Ready);
    assert_eq!(kek.decrypt(&slot, &sealed[0]).unwrap(), texts[0]);
    assert!(run_batch(&slot, Vec::new()).is_empty());
}

pub(crate) fn rewrap(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let first = Kek::new(&slot);
    let second = second_version(&slot, &first);
    slot.load_kek(first.uid, KekUse::DecryptOnly).unwrap();
    let key = [7_u8; 32];
    let old = KeyUid::random().unwrap();
    import_test_key(&slot, &key, old, "kek-exchange-key-v0").unwrap();
    slot.load_kek(old, KekUse::DecryptOnly).unwrap();

    let rewrap = |from: Ciphertext, binding: Binding, to: &str| {
        let job = RewrapJob {
            from,
            key_uid: second.uid,
            version: 2,
            binding,
            binding_value: to.into(),
        };
        run(&slot, Work::Rewrap(job))
    };

    // v2, with the caller's aad, for the same principal and for another.
    slot.load_kek(first.uid, KekUse::EncryptDecrypt).unwrap();
    let sealed = first.encrypt(&slot, b"secret").unwrap();
    slot.load_kek(first.uid, KekUse::DecryptOnly).unwrap();
    for to in ["trading-1", "trading-2"] {
        let from = Ciphertext::V2(opening(&sealed, "trading-1"));
        let moved = envelope(rewrap(from, Binding::Private, to));
        let (header, _) = Header::parse(&moved).unwrap();
        assert_eq!((header.key_uid, header.version), (second.uid, 2));
        assert_eq!(header.purpose, Purpose::Data);
        assert_eq!(
            decrypt(&slot, &moved, CONTEXT, to, b"order 17").unwrap(),
            b"secret"
        );
        for (other, aad) in [("trading-3", &b"order 17"[..]), (to, &b""[..])] {
            let refused = decrypt(&slot, &moved, CONTEXT, other, aad).unwrap_err();
            assert_eq!(refused, OpError::AuthenticationFailed);
        }
    }
    let wrong = rewrap(
        Ciphertext::V2(opening(&sealed, "trading-2")),
        Binding::Private,
        "x",
    );
    assert_eq!(wrong.err(), Some(OpError::AuthenticationFailed));

    // v1, made by another library.
    let nonce = *b"v1 nonce----";
    let payload = Payload {
        msg: b"of version 1",
        aad: &aad_v1(CONTEXT, "Trading"),
    };
    let body = Aes256Gcm::new_from_slice(&key)
        .unwrap()
        .encrypt((&nonce).into(), payload)
        .unwrap();
    let v1 = |principal: &str| {
        Ciphertext::V1(DecryptV1Job {
            key_uid: old,
            ciphertext: [nonce.as_slice(), &body].concat(),
            context: CONTEXT.into(),
            binding_value: principal.into(),
        })
    };
    let moved = envelope(rewrap(v1("Trading"), Binding::Shared, "Trading"));
    let opened = decrypt(&slot, &moved, CONTEXT, "Trading", b"").unwrap();
    assert_eq!(opened, b"of version 1");
    let wrong = rewrap(v1("trading-1"), Binding::Shared, "Trading");
    assert_eq!(wrong.err(), Some(OpError::AuthenticationFailed));

    // The key to encrypt under has to be loaded, and for encryption.
    slot.load_kek(second.uid, KekUse::DecryptOnly).unwrap();
    let refused = rewrap(v1("Trading"), Binding::Shared, "Trading");
    assert_eq!(refused.err(), Some(OpError::KeyNotLoaded));
    slot.unload_kek(second.uid).unwrap();
    let refused = rewrap(v1("Trading"), Binding::Shared, "Trading");
    assert_eq!(refused.err(), Some(OpError::KeyNotLoaded));
    assert_eq!(slot.state(), SlotState::Ready);
}

pub(crate) fn data_keys(sandbox: &Sandbox) {
    let slot = sandbox.new_slot("slot-a");
    let kek = Kek::new(&slot);
    let make = |size, plaintext| {
        let job = DataKeyJob {
            key_uid: kek.uid,
            version: 1,
            context: CONTEXT.into(),
            binding: Binding::Private,
            binding_value: "trading-1".into(),
            aad: b"order 17".to_vec(),
            size,
            plaintext,
        };
        match run(&slot, Work::DataKey(job)) {
            Ok(Output::DataKey { envelope, plaintext }) => (envelope, plaintext),
            _ => panic!("no data key"),
        }
    };
    for (size, bytes) in [(DataKeySize::Bits128, 16), (DataKeySize::Bits256, 32)] {
        let (sealed, key) = make(size, true);
        let key = key.unwrap();
        assert_eq!(key.len(), bytes);
        assert_eq!(Header::parse(&sealed).unwrap().0.purpose, Purpose::DataKey);
        assert!(kek.decrypt(&slot, &sealed).unwrap() == key.as_slice());
        // The purpose is authenticated.
        let mut as_data = sealed.clone();
        as_data[5] = Purpose::Data as u8;
        assert_eq!(
            kek.decrypt(&slot, &as_data).unwrap_err(),
            OpError::AuthenticationFailed
        );

        // It stays a data key when it is rewrapped, in one slot or from one to another.
        let job = || RewrapJob {
            from: Ciphertext::V2(opening(&sealed, "trading-1")),
            key_uid: kek.uid,
            version: 1,
            binding: Binding::Private,
            binding_value: "trading-1".into(),
        };
        let in_one = run(&slot, Work::Rewrap(job()));
        let (open, reseal) = job().split().unwrap_or_else(|error| panic!("{error}"));
        let Ok(Output::Plaintext(plaintext)) = run(&slot, open) else {
            panic!("it is not opened")
        };
        let in_two = run(&slot, reseal.seal(plaintext));
        for moved in [in_one, in_two].map(envelope) {
            assert_ne!(moved, sealed);
            assert_eq!(Header::parse(&moved).unwrap().0.purpose, Purpose::DataKey);
            assert!(kek.decrypt(&slot, &moved).unwrap() == key.as_slice());
        }
    }
    let (one, kept_back) = make(DataKeySize::Bits256, false);
    let (other, _) = make(DataKeySize::Bits256, false);
    assert!(kept_back.is_none());
    assert!(kek.decrypt(&slot, &one).unwrap() != kek.decrypt(&slot, &other).unwrap());
}

/// Longer than a busy machine stands still: a call that takes longer is a hang.
const DEADLINE: Duration = Duration::from_millis(800);

/// A slot whose calls take this long from the `n`th encryption on.
fn slow_slot(sandbox: &Sandbox, n: usize, time: Duration) -> Slot {
    let encryptions = AtomicUsize::new(0);
    slot_that_takes(sandbox, move |name| {
        let is_slow = name == "encrypt" && encryptions.fetch_add(1, Ordering::Relaxed) >= n;
        is_slow.then_some(time)
    })
}

/// A slot whose calls take as long as `time` says of their name.
fn slot_that_takes(
    sandbox: &Sandbox,
    time: impl Fn(&str) -> Option<Duration> + Send + Sync + 'static,
) -> Slot {
    sandbox.init("slot-a");
    let mut options = sandbox.options("slot-a");
    options.deadline = DEADLINE;
    // A call is over for the slot when it has been reported.
    options.on_call = Some(Arc::new(move |name, _, _| {
        if let Some(time) = time(name) {
            std::thread::sleep(time);
        }
    }));
    Slot::open(&sandbox.module(), options).unwrap_or_else(|error| panic!("{error}"))
}

fn encryptions(kek: &Kek, count: usize) -> Vec<Work> {
    (0..count)
        .map(|_| Work::Encrypt(kek.encrypt_job(b"text")))
        .collect()
}

pub(crate) fn time_is_over(sandbox: &Sandbox) {
    let slot = slow_slot(sandbox, 0, DEADLINE / 20);
    let kek = Kek::new(&slot);
    let outcomes = run_batch(&slot, encryptions(&kek, 99));
    let done = outcomes.iter().take_while(|outcome| outcome.is_ok()).count();
    assert!((1..99).contains(&done), "{done} of 99 in the time of 20");
    for outcome in &outcomes[done..] {
        assert_eq!(outcome.as_ref().err(), Some(&OpError::NotBegun));
    }
}

pub(crate) fn caller_goes(sandbox: &Sandbox) {
    let encryptions_made = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&encryptions_made);
    let slot = slot_that_takes(sandbox, move |name| match name {
        "encrypt" => {
            counter.fetch_add(1, Ordering::Relaxed);
            Some(DEADLINE / 20)
        }
        "decrypt" => Some(DEADLINE / 2),
        _ => None,
    });
    let kek = Kek::new(&slot);
    let made = || encryptions_made.swap(0, Ordering::Relaxed);
    let batch = |until: Instant| {
        let answer = start_batch_until(&slot, encryptions(&kek, 99), Some(until));
        answer.recv_timeout(PATIENCE).expect("an answer")
    };
    made();

    // One call might end after it.
    let soon = Instant::now() + DEADLINE / 2;
    let outcomes = batch(soon);
    assert!(
        outcomes
            .iter()
            .all(|outcome| outcome.as_ref().err() == Some(&OpError::NotBegun))
    );
    let single = run_until(&slot, Work::Encrypt(kek.encrypt_job(b"text")), Some(soon));
    assert_eq!(single.err(), Some(OpError::NotBegun));
    assert_eq!(made(), 0);

    // There is time to begin ten, and for the last of them a whole deadline.
    let outcomes = batch(Instant::now() + DEADLINE + DEADLINE / 2);
    let done = outcomes.iter().take_while(|outcome| outcome.is_ok()).count();
    assert!(done <= 11, "{done} items done");
    assert_eq!(made(), done);
    for outcome in &outcomes[done..] {
        assert_eq!(outcome.as_ref().err(), Some(&OpError::NotBegun));
    }
    assert_eq!(slot.state(), SlotState::Ready);
    let far = Instant::now() + PATIENCE;
    let single = run_until(&slot, Work::Encrypt(kek.encrypt_job(b"text")), Some(far));
    let sealed = envelope(single);
    made();

    // The first call of a rewrap leaves less than a whole deadline for the second.
    let rewrap = |until: Instant| {
        let job = RewrapJob {
            from: Ciphertext::V2(opening(&sealed, "trading-1")),
            key_uid: kek.uid,
            version: kek.version,
            binding: Binding::Private,
            binding_value: "trading-1".into(),
        };
        run_until(&slot, Work::Rewrap(job), Some(until))
    };
    let late = rewrap(Instant::now() + DEADLINE + DEADLINE / 4);
    assert_eq!((late.err(), made()), (Some(OpError::NotBegun), 0));
    let in_time = rewrap(Instant::now() + PATIENCE);
    assert_eq!((in_time.is_ok(), made()), (true, 1));
}

pub(crate) fn gives_way(sandbox: &Sandbox) {
    // What one deadline has time for is twenty calls; the batch has time for two deadlines.
    let slot = slow_slot(sandbox, 0, DEADLINE / 20);
    let kek = Kek::new(&slot);
    let texts: Vec<Vec<u8>> = (0..199_u32).map(|n| n.to_be_bytes().to_vec()).collect();
    let works = texts.iter().map(|text| Work::Encrypt(kek.encrypt_job(text)));
    let began = Instant::now();
    let long = start_batch(&slot, works.collect());
    for _ in 0..3 {
        // Behind the whole batch each would wait longer than its deadline.
        kek.encrypt(&slot, b"single").unwrap();
    }
    let short = run_batch(&slot, encryptions(&kek, 3));
    assert!(short.iter().all(Result::is_ok), "another batch has its turns too");
    assert!(long.try_recv().is_err(), "the long batch came first after all");

    let outcomes = long.recv_timeout(PATIENCE).expect("an answer");
    assert!(began.elapsed() < 6 * DEADLINE, "{:?}", began.elapsed());
    let done = outcomes.iter().take_while(|outcome| outcome.is_ok()).count();
    assert!((4..texts.len()).contains(&done), "{done} items done");
    for (n, outcome) in outcomes.into_iter().enumerate() {
        if n < done {
            assert_eq!(kek.decrypt(&slot, &envelope(outcome)).unwrap(), texts[n], "{n}");
        } else {
            assert_eq!(outcome.err(), Some(OpError::NotBegun), "{n}");
        }
    }

    // Between two turns when the slot is closed.
    let unfinished = start_batch(&slot, encryptions(&kek, 99));
    kek.encrypt(&slot, b"single").unwrap();
    drop(slot);
    let outcomes = unfinished.recv_timeout(PATIENCE).expect("an answer");
    assert!(outcomes[0].is_ok() && outcomes.len() == 99);
    assert!(matches!(
        outcomes[98],
        Err(OpError::SlotNotReady(SlotState::Failed { code: "closed", .. }))
    ));
}

pub(crate) fn turns_of_others(sandbox: &Sandbox) {
    // Alone the short batch would be done in half of its time, beside two others it takes more than
    // all of it.
    let slot = slow_slot(sandbox, 0, DEADLINE / 20);
    let kek = Kek::new(&slot);
    let others = [0, 1].map(|_| start_batch(&slot, encryptions(&kek, 99)));
    let began = Instant::now();
    let short = run_batch(&slot, encryptions(&kek, 10));
    let took = began.elapsed();
    let done = short.iter().take_while(|outcome| outcome.is_ok()).count();
    assert_eq!(done, 10, "of 10 items done after {took:?}");
    assert!(took > DEADLINE, "{took:?}: it did not have to share the thread");
    for other in others {
        other.recv_timeout(PATIENCE).expect("an answer");
    }
}

pub(crate) fn many_beside_each_other(sandbox: &Sandbox) {
    // Each would get its own deadline's time after one and a third of what its caller waits.
    let slot = slow_slot(sandbox, 0, DEADLINE / 40);
    let kek = Kek::new(&slot);
    let began = Instant::now();
    let batches = [(); 4].map(|()| start_batch(&slot, encryptions(&kek, 99)));
    for (n, batch) in batches.into_iter().enumerate() {
        let outcomes = batch.recv_timeout(PATIENCE).expect("an answer");
        let took = began.elapsed();
        assert!(
            took < batch_wait(DEADLINE, 99),
            "{n}: its caller is gone after {took:?}"
        );
        let done = outcomes.iter().take_while(|outcome| outcome.is_ok()).count();
        assert!((1..99).contains(&done), "{n}: {done} items done");
        for outcome in &outcomes[done..] {
            assert_eq!(outcome.as_ref().err(), Some(&OpError::NotBegun), "{n}");
        }
    }
}

pub(crate) fn hang_between_turns(sandbox: &Sandbox) {
    let slot = slot_that_takes(sandbox, |name| match name {
        "encrypt" => Some(DEADLINE / 20),
        "decrypt" => Some(4 * DEADLINE),
        _ => None,
    });
    let kek = Kek::new(&slot);
    let sealed = kek.encrypt(&slot, b"text").unwrap();
    let batch = start_batch(&slot, encryptions(&kek, 99));
    assert_eq!(kek.decrypt(&slot, &sealed).unwrap_err(), OpError::Deadline);
    let outcomes = batch.recv_timeout(PATIENCE).expect("an answer");
    let done = outcomes.iter().take_while(|outcome| outcome.is_ok()).count();
    assert!((1..20).contains(&done), "{done} items done");
    for outcome in &outcomes[done..] {
        assert!(matches!(
            outcome,
            Err(OpError::SlotNotReady(SlotState::Failed { code: "hung", .. }))
        ));
    }
    eventually("the end of the hang", || {
        matches!(slot.state(), SlotState::Failed { code: "untested", .. })
    });
    kek.test(&slot).unwrap();
    kek.encrypt(&slot, b"again").unwrap();
}

pub(crate) fn hanging_item(sandbox: &Sandbox) {
    let slot = slow_slot(sandbox, 2, 4 * DEADLINE);
    let kek = Kek::new(&slot);
    let outcomes = run_batch(&slot, encryptions(&kek, 5));
    let ok: Vec<bool> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(ok, [true, true, false, false, false]);
    for outcome in &outcomes[2..] {
        assert_eq!(outcome.as_ref().err(), Some(&OpError::Deadline));
    }
    // The batch went no further, and the slot serves again once it has passed a test.
    eventually("the end of the hang", || {
        matches!(slot.state(), SlotState::Failed { code: "untested", .. })
    });
    kek.test(&slot).unwrap();
    assert_eq!(slot.state(), SlotState::Ready);
}
