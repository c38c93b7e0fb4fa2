//! Refusals of the data plane that the moment does not explain: what the node says is wrong, or what it had to know better.

use hsm_api::ErrorCode;

use super::{Answered, Fold, Moment, SECOND};

impl Fold {
    pub(super) fn refused_to_encrypt(
        &mut self,
        context: &str,
        number: u64,
        node: u32,
        code: &str,
        answered: &Answered<'_>,
    ) {
        let name = format!("plaintext {number} of {context} on node {node}");
        match code.parse::<ErrorCode>() {
            Ok(ErrorCode::Internal) => self.internal_error(&name, node, answered.completed),
            Ok(ErrorCode::ContextHasNoKey) => {
                // Nobody has made one, or this node has not heard of it.
                if let Some(since) = self.made.since(context).filter(|since| *since < answered.invoked) {
                    let text = format!(
                        "{name} was refused with {code}, and that context had a key {:.3} s before it was asked for",
                        (answered.invoked - since) as f64 / SECOND as f64
                    );
                    self.watched.suspect(node, since, text);
                }
            }
            // Not now, or not here.
            Ok(code) if code.retryable() || code.status() == 503 => {}
            Err(_) if code == "unreachable" => {}
            _ => {
                let text = format!("{name} was to be encrypted, and was refused with {code}");
                self.history.refused_to_encrypt.push(text);
            }
        }
    }

    /// One in a second of each node.
    fn internal_error(&mut self, name: &str, node: u32, at: u64) {
        let last = self.internal.get(&node);
        if last.is_none_or(|last| at.saturating_sub(*last) >= SECOND) {
            self.internal.insert(node, at);
            let text = format!("{name} was refused with internal");
            self.history.internal.push(Moment { at, node, text });
        }
    }

    pub(super) fn refused(
        &mut self,
        key: &(String, u32),
        name: &str,
        node: u32,
        code: &str,
        answered: &Answered<'_>,
    ) {
        match code {
            "internal" => self.internal_error(name, node, answered.completed),
            "key_version_disabled" | "key_version_destroyed" => {
                if let Some(back) = self.uses.back(key).filter(|back| *back < answered.invoked) {
                    let text = format!(
                        "{name} was refused with {code}, and that version was put back into use {:.3} s before it was asked for",
                        (answered.invoked - back) as f64 / SECOND as f64
                    );
                    self.watched.suspect(node, back, text);
                }
            }
            _ => {}
        }
    }
}
