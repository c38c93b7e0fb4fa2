//! Access control as requests read it: a unit's mapping first, as in version 1, then the rules for the context. Built
//! once per change; a question takes two look-ups and a few comparisons, and no memory.

use std::collections::{BTreeSet, HashMap};

use raft_store::state::access::{Acl, AclRule, Operation, Who};

use super::Op;
use crate::config::ContextName;
use crate::identity::Principal;

/// A set of operations, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Operations(u8);

impl Operations {
    /// Those of later releases too.
    const ALL: Self = Self(u8::MAX);

    fn of(operations: &BTreeSet<Operation>) -> Self {
        Self(operations.iter().fold(0, |all, one| all | bit(*one)))
    }

    fn has(self, op: Op) -> bool {
        self.0 & bit(op.operation()) != 0
    }
}

fn bit(operation: Operation) -> u8 {
    1 << operation as u8
}

/// What a unit's mapping allows.
#[derive(Debug, Clone)]
struct Unit {
    contexts: BTreeSet<ContextName>,
    operations: Operations,
}

/// What one rule allows with one context.
#[derive(Debug, Clone)]
struct Granted {
    /// Its place among the rules.
    rule: usize,
    who: Who,
    operations: Operations,
}

/// What allows something. Its text names the place in the document of `hsmctl acl get`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant<'a> {
    /// The mapping of a unit.
    Mapping(&'a str),
    /// A rule, by its place.
    Rule(usize),
}

impl std::fmt::Display for Grant<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mapping(ou) => write!(f, "mappings.{ou}"),
            Self::Rule(place) => write!(f, "rules[{place}]"),
        }
    }
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub(super) struct Grants {
    units: HashMap<String, Unit>,
    by_context: HashMap<ContextName, Vec<Granted>>,
    /// Everybody that any rule is about, each once.
    named: BTreeSet<Who>,
}

impl Grants {
    pub(super) fn new(acl: &Acl) -> Self {
        let unit = |(ou, contexts): (&String, &BTreeSet<ContextName>)| {
            let limited = acl.operations.get(ou);
            let unit = Unit {
                contexts: contexts.clone(),
                operations: limited.map_or(Operations::ALL, Operations::of),
            };
            (ou.clone(), unit)
        };
        let mut grants = Self {
            units: acl.mappings.iter().map(unit).collect(),
            ..Self::default()
        };
        for (place, rule) in acl.rules.iter().enumerate() {
            grants.add(place, rule);
        }
        grants
    }

    fn add(&mut self, place: usize, rule: &AclRule) {
        self.named.insert(rule.who.clone());
        for context in &rule.contexts {
            self.by_context.entry(context.clone()).or_default().push(Granted {
                rule: place,
                who: rule.who.clone(),
                operations: Operations::of(&rule.operations),
            });
        }
    }

    /// Leaves out the rules that are bound to other issuers than these.
    pub(super) fn keep_issuers(&mut self, known: &[String]) {
        let keep = |who: &Who| who.issuer.as_ref().is_none_or(|issuer| known.contains(issuer));
        self.named.retain(keep);
        for granted in self.by_context.values_mut() {
            granted.retain(|granted| keep(&granted.who));
        }
    }

    /// Whether a principal of a unit could be allowed anything: it has a mapping, if only an empty one, or a rule is
    /// about it.
    pub(super) fn knows(&self, ou: &str, principal: &Principal) -> bool {
        self.units.contains_key(ou) || self.named.iter().any(|who| is(who, principal))
    }

    /// What allows an operation, if anything does.
    pub(super) fn find<'a>(
        &self,
        ou: &'a str,
        principal: &Principal,
        context: &str,
        op: Op,
    ) -> Option<Grant<'a>> {
        let mapped = |unit: &Unit| unit.operations.has(op) && unit.contexts.contains(context);
        if self.units.get(ou).is_some_and(mapped) {
            return Some(Grant::Mapping(ou));
        }
        let granted = self.by_context.get(context)?.iter();
        let mut granted = granted.filter(|granted| granted.operations.has(op));
        let granted = granted.find(|granted| is(&granted.who, principal))?;
        Some(Grant::Rule(granted.rule))
    }

    /// The contexts that a principal of a unit may do anything with.
    pub(super) fn contexts(&self, ou: &str, principal: &Principal) -> BTreeSet<ContextName> {
        let useful = |operations: Operations| operations != Operations(0);
        let mapped = self.units.get(ou).filter(|unit| useful(unit.operations));
        let mut contexts = mapped.map(|unit| unit.contexts.clone()).unwrap_or_default();
        let allows = |granted: &Granted| useful(granted.operations) && is(&granted.who, principal);
        let granted = self
            .by_context
            .iter()
            .filter(|(_, granted)| granted.iter().any(allows));
        contexts.extend(granted.map(|(context, _)| context.clone()));
        contexts
    }
}

/// Every part that is named. A rule that names nobody is about nobody: no command makes one.
fn is(who: &Who, principal: &Principal) -> bool {
    let named = who.issuer.is_some() || who.ou.is_some() || who.cn.is_some();
    named
        && who
            .issuer
            .as_ref()
            .is_none_or(|issuer| *issuer == principal.issuer_dn)
        && who.ou.as_ref().is_none_or(|ou| principal.ou.as_ref() == Some(ou))
        && who.cn.as_ref().is_none_or(|cn| *cn == principal.cn)
}
