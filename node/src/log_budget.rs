//! How many lines of the log callers can cause: enough to see what each of them does, too few to fill a disk
//! or to hide what the others do. What is left out is counted, and said.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use hsm_api::ErrorCode;

use crate::identity::Principal;
use crate::lock::lock;

/// Lines of one source in one [`WINDOW`].
const LINES: u32 = 50;
const WINDOW: Duration = Duration::from_secs(10);
/// Sources remembered in each class. Beyond it strangers share one budget.
const SOURCES: usize = 4096;
/// The source that strangers share.
const STRANGERS: u64 = 0;

/// One for the process, as there is one log.
static BUDGET: LazyLock<LogBudget> = LazyLock::new(LogBudget::default);

/// Whether one more refusal of a caller's request may be logged. Ask only if the line's level is enabled:
/// what is not written must cost nothing.
pub fn refusal(principal: Option<&Principal>) -> bool {
    let mut class = lock(&BUDGET.refusals);
    class.allows(
        BUDGET.hasher.hash_one(principal.map(Principal::account)),
        Instant::now(),
    )
}

/// Whether one more connection from an address may be logged that was refused before anybody has shown a certificate on
/// it. Ask as [`refusal`].
pub fn refused_address(address: IpAddr) -> bool {
    let mut class = lock(&BUDGET.addresses);
    class.allows(BUDGET.hasher.hash_one(network(address)), Instant::now())
}

/// Who has an address of IPv6 has the /64 that it is in.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from(u128::from(address) >> 64 << 64).into(),
        address => address,
    }
}

/// Whether one more request that the service could not answer may be logged: a budget for each code, which
/// no caller's mistakes can spend.
pub fn fault(code: ErrorCode) -> bool {
    let mut class = lock(&BUDGET.faults);
    class.allows(BUDGET.hasher.hash_one(code.as_str()), Instant::now())
}

/// Whether one more audit line may be written of a caller's reads and refused calls.
pub fn audit(principal: &Principal) -> bool {
    let mut class = lock(&BUDGET.audit);
    class.allows(BUDGET.hasher.hash_one(principal.account()), Instant::now())
}

/// Says how many lines were left out since the last time. To be called every few seconds.
pub fn say_suppressed() {
    let [refusals, addresses, faults, audit] = BUDGET.take_suppressed();
    for (class, suppressed) in [
        ("refused requests", refusals),
        ("refused connections", addresses),
        ("requests not served", faults),
    ] {
        if suppressed > 0 {
            tracing::warn!(class, suppressed, "log lines suppressed");
        }
    }
    if audit > 0 {
        tracing::warn!(
            target: "audit", epoch = crate::logging::epoch(),
            class = "reads and refusals",
            suppressed = audit,
            "audit lines suppressed"
        );
    }
}

#[derive(Default)]
struct LogBudget {
    /// Sources are remembered by a hash: a collision costs two of them a shared budget.
    hasher: RandomState,
    refusals: Mutex<Class>,
    /// Apart from [`LogBudget::refusals`]: anybody can come from many addresses, and the sources of a class are few.
    addresses: Mutex<Class>,
    faults: Mutex<Class>,
    audit: Mutex<Class>,
}

impl LogBudget {
    fn take_suppressed(&self) -> [u64; 4] {
        [&self.refusals, &self.addresses, &self.faults, &self.audit]
            .map(|class| std::mem::take(&mut lock(class).suppressed))
    }
}

/// Lines that are counted together; no line of one class costs one of another.
#[derive(Default)]
struct Class {
    sources: HashMap<u64, Spent>,
    suppressed: u64,
}

struct Spent {
    since: Instant,
    lines: u32,
}

impl Spent {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= WINDOW
    }
}

impl Class {
    fn allows(&mut self, source: u64, now: Instant) -> bool {
        let source = self.place(source, now);
        let fresh = || Spent { since: now, lines: 0 };
        let spent = self.sources.entry(source).or_insert_with(fresh);
        if spent.is_over(now) {
            *spent = fresh();
        }
        if spent.lines < LINES {
            spent.lines += 1;
            return true;
        }
        self.suppressed += 1;
        false
    }

    fn place(&mut self, source: u64, now: Instant) -> u64 {
        if self.sources.len() < SOURCES || self.sources.contains_key(&source) {
            return source;
        }
        self.sources.retain(|_, spent| !spent.is_over(now));
        if self.sources.len() < SOURCES {
            source
        } else {
            STRANGERS
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn allowed(class: &mut Class, source: u64, lines: u32, now: Instant) -> usize {
        (0..lines).filter(|_| class.allows(source, now)).count()
    }

    #[test]
    fn one_sources_lines_cost_no_other_source_its_own() {
        let (mut class, now) = (Class::default(), Instant::now());
        assert_eq!(allowed(&mut class, 1, 1000, now), LINES as usize);
        assert_eq!(allowed(&mut class, 2, 10, now), 10);
        assert_eq!(class.suppressed, 1000 - u64::from(LINES));
    }

    #[test]
    fn a_budget_is_whole_again_after_its_window() {
        let (mut class, now) = (Class::default(), Instant::now());
        assert_eq!(allowed(&mut class, 1, LINES, now), LINES as usize);
        assert_eq!(
            allowed(&mut class, 1, 1, now + WINDOW - Duration::from_millis(1)),
            0
        );
        assert_eq!(allowed(&mut class, 1, 1, now + WINDOW), 1);
    }

    #[test]
    fn the_number_of_sources_is_bounded_and_idle_ones_are_forgotten() {
        let (mut class, now) = (Class::default(), Instant::now());
        let sources = SOURCES as u64;
        for source in 1..=sources {
            assert!(class.allows(source, now));
        }
        // Strangers share what one source has; whoever is known keeps its own.
        let strangers = (sources + 1..=2 * sources).filter(|source| class.allows(*source, now));
        assert_eq!(strangers.count(), LINES as usize);
        assert!(class.allows(1, now));
        assert!(class.sources.len() <= SOURCES + 1);
        assert!(class.allows(3 * sources, now + WINDOW));
        assert_eq!(class.sources.len(), 1);
    }

    #[test]
    fn what_was_suppressed_is_said_once() {
        let budget = LogBudget::default();
        allowed(&mut lock(&budget.audit), 1, LINES + 3, Instant::now());
        assert_eq!(budget.take_suppressed(), [0, 0, 0, 3]);
        assert_eq!(budget.take_suppressed(), [0, 0, 0, 0]);
    }

    #[test]
    fn many_addresses_leave_principals_their_lines() {
        for number in 0..2 * SOURCES as u32 {
            refused_address(IpAddr::V4((0x0a00_0000 + number).into()));
        }
        assert_eq!(lock(&BUDGET.addresses).sources.len(), SOURCES + 1);
        let sources = lock(&BUDGET.refusals).sources.len();
        assert!(sources < SOURCES, "{sources} sources of refusals");
    }

    #[test]
    fn a_network_of_ipv6_is_one_source() {
        let network = |text: &str| network(text.parse().unwrap());
        assert_eq!(network("2001:db8::1"), network("2001:db8::ffff:0:0:2"));
        assert_ne!(network("2001:db8::1"), network("2001:db8:0:1::1"));
        assert_ne!(network("192.0.2.1"), network("192.0.2.2"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
    }

    #[test]
    fn a_callers_refusals_leave_the_services_faults_their_lines() {
        while refusal(None) {}
        assert!(!refusal(None));
        assert!(fault(ErrorCode::NoQuorum));
    }
}
