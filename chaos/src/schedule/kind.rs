//! The kinds of faults, by the names that the command line and the folders of runs have for them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Fault, Shape, Trouble, Victims};

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// What a fault is, without its numbers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum FaultKind {
            $($(#[$doc])* #[serde(rename = $name)] $kind,)*
        }

        impl FaultKind {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$kind),*];

            /// As the command line and files write it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }
        }
    };
}

kinds! {
    /// SIGKILL to the leader.
    KillLeader = "kill-leader",
    /// SIGKILL to somebody who does not lead.
    KillFollower = "kill-follower",
    /// SIGKILL to as many as may fail.
    KillMinority = "kill-minority",
    /// SIGKILL to all.
    KillAll = "kill-all",
    /// SIGSTOP for half an election time-out up to three.
    Pause = "pause",
    /// The leader without a quorum.
    LeaderInMinority = "leader-in-minority",
    /// Others without one.
    LeaderInMajority = "leader-in-majority",
    /// One direction of one link.
    OneWay = "one-way",
    /// Two halves that share one node.
    Bridge = "bridge",
    /// One node alone for so long that a snapshot has to bring it back.
    IsolateUntilSnapshot = "isolate-until-snapshot",
    /// Delay and jitter between the nodes.
    Delay = "delay",
    /// Lost segments and reset connections.
    Loss = "loss",
    /// Slow lines.
    ByteRate = "byte-rate",
    /// No space left.
    DiskFull = "disk-full",
    /// Every synchronisation takes long.
    SlowFsync = "slow-fsync",
    /// Synchronisations fail.
    FailingFsync = "failing-fsync",
    /// What was written and not synchronised is gone after a kill.
    LostWrites = "lost-writes",
    /// A write of which only the first part is there.
    TornTail = "torn-tail",
    /// The leader's wall clock.
    ClockStep = "clock-step",
    /// The folder of the tokens is gone.
    TokenDeleted = "token-deleted",
    /// An older copy of it.
    TokenOlder = "token-older",
    /// It cannot be read.
    TokenUnreadable = "token-unreadable",
    /// The PKCS#11 module is slow.
    TokenSlow = "token-slow",
    /// It hangs.
    TokenHung = "token-hung",
    /// It returns errors.
    TokenErrors = "token-errors",
    /// One node joins, one is removed.
    JoinRemove = "join-remove",
    /// A node dies at a chosen line of the product.
    Failpoint = "failpoint",
    /// Leadership is handed over, by a command that is repeated blindly.
    Transfer = "transfer",
    /// The transport key of a slot is replaced, by a command that is repeated blindly.
    Rekey = "rekey",
    /// The replication key is replaced, over restarts, by a command that is repeated blindly.
    RekeyReplication = "rekey-replication",
}

impl FaultKind {
    /// Nodes get SIGKILL, and nothing else is wrong: clients of the others notice nothing.
    #[must_use]
    pub fn is_kill(self) -> bool {
        matches!(
            self,
            Self::KillLeader | Self::KillFollower | Self::KillMinority | Self::KillAll
        )
    }

    /// Breaks no node, and goes on beside those that do.
    #[must_use]
    pub fn is_weather(self) -> bool {
        matches!(
            self,
            Self::Delay | Self::Loss | Self::ByteRate | Self::SlowFsync | Self::ClockStep | Self::TokenSlow
        )
    }

    /// Whether it is carried out once more where it had no effect. A change of members uses up the number of a node.
    #[must_use]
    pub fn may_be_repeated(self) -> bool {
        self != Self::JoinRemove
    }

    /// Whether some nodes have to go on without others.
    #[must_use]
    pub fn needs_three(self) -> bool {
        matches!(
            self,
            Self::KillMinority
                | Self::LeaderInMinority
                | Self::LeaderInMajority
                | Self::OneWay
                | Self::Bridge
                | Self::IsolateUntilSnapshot
                | Self::JoinRemove
                | Self::Transfer
        )
    }

    /// Whether the layer of [`crate::faults::unsynced`] has to be under the nodes' data.
    #[must_use]
    pub fn needs_layer(self) -> bool {
        matches!(
            self,
            Self::SlowFsync | Self::FailingFsync | Self::LostWrites | Self::TornTail
        )
    }

    /// Whether the module of [`cluster_tests::Shim`] has to be before the nodes' tokens.
    #[must_use]
    pub fn needs_shim(self) -> bool {
        matches!(self, Self::TokenSlow | Self::TokenHung | Self::TokenErrors)
    }

    /// Whether relays have to be between the nodes, where partitions are not made by routes.
    #[must_use]
    pub fn is_of_network(self) -> bool {
        matches!(self, Self::Delay | Self::Loss | Self::ByteRate) || self.is_partition()
    }

    /// Whether links are cut.
    #[must_use]
    pub fn is_partition(self) -> bool {
        matches!(
            self,
            Self::LeaderInMinority
                | Self::LeaderInMajority
                | Self::OneWay
                | Self::Bridge
                | Self::IsolateUntilSnapshot
        )
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Fault {
    /// What it is.
    #[must_use]
    pub fn kind(&self) -> FaultKind {
        match self {
            Self::Kill(Victims::Leader, _) => FaultKind::KillLeader,
            Self::Kill(Victims::Follower, _) => FaultKind::KillFollower,
            Self::Kill(Victims::Minority, _) => FaultKind::KillMinority,
            Self::Kill(Victims::All, _) => FaultKind::KillAll,
            Self::Pause { .. } => FaultKind::Pause,
            Self::Partition(Shape::LeaderInMinority, _) => FaultKind::LeaderInMinority,
            Self::Partition(Shape::LeaderInMajority, _) => FaultKind::LeaderInMajority,
            Self::Partition(Shape::OneWay { .. }, _) => FaultKind::OneWay,
            Self::Partition(Shape::Bridge, _) => FaultKind::Bridge,
            Self::IsolateUntilSnapshot(_) => FaultKind::IsolateUntilSnapshot,
            Self::Delay { .. } => FaultKind::Delay,
            Self::Loss { .. } => FaultKind::Loss,
            Self::ByteRate { .. } => FaultKind::ByteRate,
            Self::DiskFull { .. } => FaultKind::DiskFull,
            Self::SlowFsync { .. } => FaultKind::SlowFsync,
            Self::FailingFsync { .. } => FaultKind::FailingFsync,
            Self::LostWrites { .. } => FaultKind::LostWrites,
            Self::TornTail { .. } => FaultKind::TornTail,
            Self::ClockStep { .. } => FaultKind::ClockStep,
            Self::Token(Trouble::Deleted { .. }, _) => FaultKind::TokenDeleted,
            Self::Token(Trouble::Older, _) => FaultKind::TokenOlder,
            Self::Token(Trouble::Unreadable, _) => FaultKind::TokenUnreadable,
            Self::Token(Trouble::Slow { .. }, _) => FaultKind::TokenSlow,
            Self::Token(Trouble::Hung, _) => FaultKind::TokenHung,
            Self::Token(Trouble::Errors { .. }, _) => FaultKind::TokenErrors,
            Self::JoinRemove { .. } => FaultKind::JoinRemove,
            Self::Failpoint { .. } => FaultKind::Failpoint,
            Self::Transfer { .. } => FaultKind::Transfer,
            Self::Rekey { .. } => FaultKind::Rekey,
            Self::RekeyReplication { .. } => FaultKind::RekeyReplication,
        }
    }
}
