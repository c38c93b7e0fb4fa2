//! Requests of the data plane: of each is kept what the oracles have to know, and whether its answer was one that could be given.

use super::{Answer, Answered, Fold, KEPT, Kept, LateAsk, Moment, Outcome, PROMPT, SECOND};

/// One more in the second of this time.
fn count(seconds: &mut Vec<u32>, at: u64) {
    let second = usize::try_from(at / SECOND).unwrap_or(usize::MAX);
    if seconds.len() <= second {
        seconds.resize(second + 1, 0);
    }
    seconds[second] += 1;
}

impl Fold {
    pub(super) fn encrypted(&mut self, context: &str, number: u64, answered: &Answered<'_>) {
        let Outcome::Ok(Answer::Sealed { version, ciphertext }) = answered.outcome else {
            return;
        };
        self.behind(context, *version, number, answered);
        count(&mut self.history.encrypted_in, answered.completed);
        let kept = Kept {
            number,
            ciphertext: ciphertext.clone(),
        };
        let known = self.history.versions.entry((context.to_owned(), *version));
        let known = known.or_default();
        known.total += 1;
        if known.kept.len() < KEPT {
            known.kept.push(kept);
            return;
        }
        // Each of the `total` so far is kept with the same chance.
        let place = usize::try_from(self.random.below(known.total)).unwrap_or(usize::MAX);
        if let Some(old) = known.kept.get_mut(place) {
            *old = kept;
        }
    }

    /// An answer says from which state it was made, at least.
    fn behind(&mut self, context: &str, version: u32, number: u64, answered: &Answered<'_>) {
        let (Some(index), Some(floors)) = (answered.index, self.floors.get(context)) else {
            return;
        };
        if let Some((at, newer)) = floors.at(index).filter(|(_, newer)| *newer > version) {
            self.history.behind.push(format!(
                "plaintext {number} of {context} was encrypted under version {version} from a state of index {index}, and \
                 version {newer} is active since {at} at the latest"
            ));
        }
    }

    pub(super) fn decrypted(&mut self, key: (&str, u32), number: u64, node: u32, answered: &Answered<'_>) {
        let key = (key.0.to_owned(), key.1);
        let name = format!("plaintext {number} of {} version {} on node {node}", key.0, key.1);
        match answered.outcome {
            Outcome::Ok(Answer::Opened { right }) => {
                if let Some(at) = self.destroyed.get(&key).filter(|at| **at < answered.invoked) {
                    let seconds = (answered.invoked - at) as f64 / SECOND as f64;
                    let text = format!(
                        "{name} was decrypted, asked for {seconds:.3} s after it was said to be destroyed"
                    );
                    self.history.revived.push(text);
                }
                if let (Some(unused), Some(index)) = (self.unused.get(&key), answered.index)
                    && *unused <= index
                {
                    let text = format!(
                        "{name} was decrypted from a state of index {index}, and the version is out of use since {unused} at \
                         the latest"
                    );
                    self.history.revived.push(text);
                }
                let known = self.history.versions.entry(key).or_default();
                if *right {
                    known.opened += 1;
                    count(&mut self.history.decrypted_in, answered.completed);
                } else {
                    known.wrong.push(name);
                }
                let last = known.last_opened.is_none_or(|(at, _)| at < answered.invoked);
                if last {
                    known.last_opened = Some((answered.invoked, node));
                }
            }
            Outcome::Refused { code } => {
                self.refused(&key, &name, node, code, answered);
                let known = self.history.versions.entry(key).or_default();
                let refused = known.refused.entry(code.clone()).or_default();
                if refused.count == 0 {
                    (refused.first_at, refused.first_node) = (answered.completed, node);
                }
                refused.count += 1;
            }
            Outcome::Ok(_) | Outcome::Unknown { .. } => {}
        }
    }

    pub(super) fn asked(&mut self, cn: &str, node: u32, answered: &Answered<'_>) {
        match answered.outcome {
            Outcome::Ok(_) => {
                self.history.asked += 1;
                let Some((at, index)) = self.revoked.get(cn) else {
                    return;
                };
                let knew = index.is_some_and(|revoked| answered.index.is_some_and(|made| made >= revoked));
                if answered.invoked > *at || knew {
                    let late = LateAsk {
                        cn: cn.to_owned(),
                        node,
                        after_ns: answered.invoked.saturating_sub(*at),
                        knew,
                        stale: answered.stale,
                    };
                    self.lingers(&late, answered.invoked);
                    let kind = (node, knew, answered.stale);
                    let worst = self.history.late.entry(kind).or_insert_with(|| late.clone());
                    if worst.after_ns < late.after_ns {
                        *worst = late;
                    }
                }
            }
            Outcome::Refused { code } if code == "certificate_revoked" => {
                self.history.turned_away += 1;
                if !self.named.contains(cn) {
                    let text = format!("node {node} turned {cn} away, whom nobody has revoked");
                    self.history.turned_away_early.push(text);
                }
            }
            _ => {}
        }
    }

    /// Whether that was too long goes by whether the node could be reached then.
    fn lingers(&mut self, late: &LateAsk, at: u64) {
        let (node, cn) = (late.node, &late.cn);
        let lately = |last: &u64| at < last + SECOND;
        if late.after_ns < PROMPT || late.stale || self.lingered.get(&node).is_some_and(lately) {
            return;
        }
        self.lingered.insert(node, at);
        let seconds = late.after_ns as f64 / SECOND as f64;
        let text = format!(
            "node {node} let {cn} in {seconds:.3} s after the revocation was acknowledged, and nothing kept it from hearing of that"
        );
        self.history.lingering.push(Moment { at, node, text });
    }
}
