//! Each fault with all that can be drawn for it, as a plan says it.

use serde::{Deserialize, Serialize};

/// A shape of a broken network of three or more nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// The leader, with as many others as make no quorum.
    LeaderInMinority,
    /// Others than the leader, as many as make no quorum.
    LeaderInMajority,
    /// Nothing of the first reaches the second: one of the two leads, and which is said.
    OneWay {
        /// The leader is the one that is not heard.
        from_leader: bool,
    },
    /// Two halves that only one node between them, which does not lead, can talk to.
    Bridge,
}

/// One fault with all that was drawn for it. `pick` chooses among those that it can hit when it comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// SIGKILL.
    Kill(Victims, u32),
    /// SIGSTOP for so many tenths of the longest election time-out.
    Pause {
        /// The leader, else somebody else.
        leader: bool,
        /// Who else.
        pick: u32,
        /// Tenths of the longest election time-out.
        tenths: u32,
    },
    /// A network in parts.
    Partition(Shape, u32),
    /// One node alone, until the others no longer have the log that it needs.
    IsolateUntilSnapshot(u32),
    /// Weather on every way.
    Delay {
        /// One way.
        delay_ms: u32,
        /// At most, besides.
        jitter_ms: u32,
    },
    /// Lost segments and reset connections.
    Loss {
        /// Of a thousand.
        lost_permille: u32,
        /// Of a thousand.
        reset_permille: u32,
    },
    /// Slow lines.
    ByteRate {
        /// Of each connection.
        bytes_per_second: u32,
    },
    /// No space on the disk of one node.
    DiskFull {
        /// The leader, else somebody else.
        leader: bool,
        /// Who else.
        pick: u32,
    },
    /// Slow synchronisation on one node.
    SlowFsync {
        /// The leader, else somebody else.
        leader: bool,
        /// Who else.
        pick: u32,
        /// Each.
        ms: u32,
    },
    /// Synchronisation that fails on one node.
    FailingFsync {
        /// The leader, else somebody else.
        leader: bool,
        /// Who else.
        pick: u32,
    },
    /// Power is lost: what was written and not synchronised is gone.
    LostWrites {
        /// Of all nodes at once, else of one.
        all: bool,
        /// Which one; the leader is one of them.
        pick: u32,
    },
    /// Power is lost in the middle of a write, or the end of the store is cut off while the node does not run.
    TornTail {
        /// While it does not run.
        on_stopped: bool,
        /// Which one.
        pick: u32,
        /// How much of the last write is there, or of the store is cut off, of a thousand.
        permille: u32,
    },
    /// The wall clock of the leader.
    ClockStep {
        /// By how much.
        seconds: i64,
    },
    /// Something happens to the tokens of one node, or to the module in front of them.
    Token(Trouble, u32),
    /// A new node joins and an old one is removed, while something breaks.
    JoinRemove {
        /// What breaks meanwhile, each time.
        meanwhile: Meanwhile,
        /// With the removal the transport keys that the node had are replaced, and every context that it had a key of rotates.
        rotate: bool,
        /// Which old one, and when it is interrupted.
        pick: u32,
    },
    /// A node dies at a chosen line.
    Failpoint {
        /// Of [`crate::faults::failpoint::points`], modulo their number.
        point: u32,
        /// Which node, where it does not follow from the point.
        pick: u32,
    },
    /// Leadership is handed over, and asked for once more.
    Transfer {
        /// To a certain node, else to the best.
        named: bool,
        /// Which one.
        pick: u32,
    },
    /// The transport key of a slot is replaced, twice, and each time asked for again.
    Rekey {
        /// The leader is killed meanwhile.
        kill_leader: bool,
        /// At which line, where runs have failpoints: of [`cluster_tests::failpoints::REKEY`], modulo their number.
        point: u32,
    },
    /// The replication key is replaced, over restarts of all nodes, and asked for again.
    RekeyReplication {
        /// The leader is killed meanwhile.
        kill_leader: bool,
        /// As above, of [`cluster_tests::failpoints::RESEAL`].
        point: u32,
    },
}

/// What breaks while an operator changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Meanwhile {
    /// Nothing.
    Nothing,
    /// SIGKILL to the leader.
    LeaderKilled,
    /// The same at a line of the change, where failpoints are among the faults of a run: of
    /// [`cluster_tests::failpoints::MEMBERSHIP`], and at a removal of [`cluster_tests::failpoints::BURY`] too, modulo their
    /// number.
    LeaderKilledAt(u32),
    /// The leader is cut off from all others, for longer than an election takes.
    LeaderCutOff,
    /// SIGSTOP to the leader, for about as long as an election takes.
    LeaderPaused,
    /// SIGKILL to the node that comes or goes. Who comes is started again; who goes stays dead.
    NodeKilled,
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Victims {
    /// Whoever leads then.
    Leader,
    /// Somebody who does not.
    Follower,
    /// As many as may fail at once, whoever leads.
    Minority,
    /// All.
    All,
}

/// What is wrong with tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trouble {
    /// Their folder is gone.
    Deleted {
        /// Under a running node.
        running: bool,
    },
    /// An older copy stands in its place.
    Older,
    /// It cannot be read.
    Unreadable,
    /// Every call takes longer.
    Slow {
        /// By so much.
        ms: u32,
    },
    /// No call returns.
    Hung,
    /// Every call fails.
    Errors {
        /// A `CKR_` of PKCS#11.
        code: u32,
    },
}
