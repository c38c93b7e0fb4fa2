//! The control file byte by byte: what lies on disk, and what any damage to it comes to.

use openraft::{CommittedLeaderId, LeaderId};

use super::*;

fn example() -> Control {
    Control {
        node_name: "hsm-node-1".into(),
        incarnation: Incarnation([7; 16]),
        cluster_id: ClusterId([9; 16]),
        epoch: 1,
        raft_id: 3,
        vote: Some(Vote {
            leader_id: LeaderId::new(4, 3),
            committed: true,
        }),
        last_log: Some(LogId::new(CommittedLeaderId::new(4, 3), 17)),
        last_purged: Some(LogId::new(CommittedLeaderId::new(2, 1), 5)),
        poison: None,
    }
}

/// [`example`], encoded, without its poison.
const BODY: &str = concat!(
    "0a00000000000000",
    "68736d2d6e6f64652d31",
    "07070707070707070707070707070707",
    "09090909090909090909090909090909",
    "0100000000000000",
    "0300000000000000",
    "01",
    "0400000000000000",
    "0300000000000000",
    "01",
    "01",
    "0400000000000000",
    "0300000000000000",
    "1100000000000000",
    "01",
    "0200000000000000",
    "0100000000000000",
    "0500000000000000",
);

#[test]
fn golden_bytes_of_control_with_every_poison() {
    let rolled_back = Poison::RolledBack {
        durable_index: 3,
        seen_index: 9,
    };
    let cases = [
        (None, "00"),
        (Some(Poison::Removed), "0100000000"),
        (Some(rolled_back), "010100000003000000000000000900000000000000"),
    ];
    for (poison, tail) in cases {
        let control = Control { poison, ..example() };
        let bytes = codec::encode(&control).unwrap();
        assert_eq!(hex::encode(&bytes), format!("{BODY}{tail}"));
        assert_eq!(codec::decode::<Control>(&bytes).unwrap(), control);
    }
}

/// Magic, version, sequence, length; contents; checksum.
#[test]
fn golden_bytes_of_both_slots_and_the_old_form_is_read() {
    let slots = [
        (
            SLOT,
            format!(
                "48534d4354524c31{}{}{BODY}00{}",
                "0000000000000001", "00000087", "150af137"
            ),
        ),
        (
            0,
            format!(
                "48534d4354524c31{}{}{BODY}00{}",
                "0000000000000002", "00000087", "411438ff"
            ),
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    ControlFile::create(&path, &example()).unwrap();
    let written = std::fs::read(&path).unwrap();
    let old = dir.path().join("old");
    let file = File::create(&old).unwrap();
    for (at, slot) in slots {
        let slot = hex::decode(slot).unwrap();
        let from = at as usize;
        assert_eq!(hex::encode(&written[from..from + slot.len()]), hex::encode(&slot));
        file.write_all_at(&slot, at).unwrap();
    }
    let (opened, control) = ControlFile::open(&old).unwrap().unwrap();
    assert_eq!((opened.sequence, control), (2, example()));
}

#[test]
fn a_damaged_newest_slot_falls_back_to_the_other_and_two_damaged_ones_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let mut file = ControlFile::create(&path, &example()).unwrap();
    let newer = Control {
        raft_id: 99,
        ..example()
    };
    file.write(&newer).unwrap();
    assert_eq!(ControlFile::open(&path).unwrap().unwrap().1, newer);
    let raw = OpenOptions::new().write(true).open(&path).unwrap();
    raw.write_all_at(b"x", (file.sequence % 2) * SLOT + 30).unwrap();
    let (mut again, control) = ControlFile::open(&path).unwrap().unwrap();
    assert_eq!(control, example());
    again.write(&newer).unwrap();
    assert_eq!(ControlFile::open(&path).unwrap().unwrap().1, newer);
    raw.write_all_at(b"x", 30).unwrap();
    raw.write_all_at(b"x", SLOT + 30).unwrap();
    assert!(ControlFile::open(&path).is_err());
}

/// Identity and poison are in both slots; vote and ends of the log may be those of the write before.
#[test]
fn any_flipped_bit_of_either_slot_leaves_who_the_node_is_and_whether_it_may_run() {
    for poison in [None, Some(Poison::Removed)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let older = Control { poison, ..example() };
        let newer = Control {
            vote: Some(Vote {
                leader_id: LeaderId::new(5, 3),
                committed: false,
            }),
            last_log: Some(LogId::new(CommittedLeaderId::new(5, 3), 18)),
            ..older.clone()
        };
        let mut file = ControlFile::create(&path, &older).unwrap();
        file.write(&newer).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let slot = HEAD + codec::encode(&newer).unwrap().len() + 4;
        let raw = OpenOptions::new().write(true).open(&path).unwrap();
        let newest_at = (file.sequence % 2) * SLOT;
        for at in [0, SLOT] {
            for bit in 0..slot * 8 {
                let place = at as usize + bit / 8;
                raw.write_all_at(&[whole[place] ^ (1 << (bit % 8))], place as u64)
                    .unwrap();
                let (_, control) = ControlFile::open(&path).unwrap().unwrap();
                let expected = if at == newest_at { &older } else { &newer };
                assert_eq!(control, *expected, "bit {bit} of the slot at {at}");
                raw.write_all_at(&whole[place..=place], place as u64).unwrap();
            }
        }
    }
}

#[test]
fn what_a_newer_release_wrote_is_refused_even_beside_a_slot_that_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let frame = |version: u8, body: &[u8]| {
        let mut slot = [MAGIC.as_slice(), &[version], &9u64.to_be_bytes()].concat();
        slot.extend_from_slice(&(body.len() as u32).to_be_bytes());
        slot.extend_from_slice(body);
        slot.extend_from_slice(&crc32c::crc32c(&slot).to_be_bytes());
        slot
    };
    let unknown_poison = hex::decode(format!("{BODY}0102000000")).unwrap();
    for newer in [frame(b'2', b"anything"), frame(VERSION, &unknown_poison)] {
        let _ = std::fs::remove_file(&path);
        ControlFile::create(&path, &example()).unwrap();
        let raw = OpenOptions::new().write(true).open(&path).unwrap();
        raw.write_all_at(&newer, SLOT).unwrap();
        let why = ControlFile::open(&path).unwrap_err().to_string();
        assert!(why.contains("start that release"), "{why}");
        // Damaged, it is what anybody may have written.
        raw.write_all_at(b"x", SLOT + 12).unwrap();
        assert_eq!(ControlFile::open(&path).unwrap().unwrap().1, example());
    }
}

#[test]
fn what_a_kill_left_of_a_file_that_was_being_made_is_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    std::fs::write(dir.path().join("control.new"), vec![0xff; 9000]).unwrap();
    assert!(
        ControlFile::open(&path).unwrap().is_none(),
        "nothing was promised yet"
    );
    ControlFile::create(&path, &example()).unwrap();
    assert_eq!(ControlFile::open(&path).unwrap().unwrap().1, example());
    assert!(!dir.path().join("control.new").exists());
}

#[test]
fn a_directory_is_looked_at_beside_the_node_that_runs() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Control::peek(dir.path()).unwrap(), None);
    let path = dir.path().join("control");
    let new = Control::fresh("hsm-node-1".into(), Incarnation([7; 16]));
    let mut file = ControlFile::create(&path, &new).unwrap();
    let seen = Control::peek(dir.path()).unwrap().unwrap();
    assert!(seen == new && !seen.is_founded());
    file.write(&example()).unwrap();
    let seen = Control::peek(dir.path()).unwrap().unwrap();
    assert!(seen == example() && seen.is_founded());
    // Whoever only looks makes nothing, and mends nothing.
    std::fs::write(&path, b"HSMCTRL1").unwrap();
    assert!(matches!(Control::peek(dir.path()), Err(StoreFailure::Damaged(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"HSMCTRL1");
}
