//! Calls about key versions.

use std::time::Duration;

use hsm_api::admin::{CleanupRequest, CreateKekRequest, DestroyKeyRequest, KeyState, KeyVersionResponse};

use super::{Clients, ended};
use crate::history::{Answer, ContextView, Operation, Outcome};

/// Between two looks at a destruction, of which each lists all versions that there ever were.
const LOOK: Duration = Duration::from_millis(500);
/// The same once it waits for a node or a leader.
const LATER: Duration = Duration::from_secs(2);
/// When it does so.
const SOON: Duration = Duration::from_secs(5);

impl Clients {
    /// Makes the next version.
    pub async fn rotate(&self, process: u32, context: &str, node: Option<u32>, key: &str) -> Option<u32> {
        let pending = self.begin(
            process,
            Operation::Rotate {
                context: context.to_owned(),
                key: key.to_owned(),
            },
        );
        let answer = self.admin(node).rotate(context, Some(key)).await;
        ended(pending, answer, |answer| Answer::Rotated {
            version: answer.version,
            previous: (answer.previous_version > 0).then_some(answer.previous_version),
        })
        .map(|answer| answer.version)
    }

    /// Makes the next version by the command for new keys.
    pub async fn create(&self, process: u32, context: &str, node: Option<u32>, key: &str) -> Option<u32> {
        let pending = self.begin(
            process,
            Operation::Create {
                context: context.to_owned(),
                key: key.to_owned(),
            },
        );
        let request = CreateKekRequest::new(context);
        let answer = self.admin(node).create_kek(&request, Some(key)).await;
        ended(pending, answer, |answer| Answer::Rotated {
            version: answer.version,
            previous: None,
        })
        .map(|answer| answer.version)
    }

    /// The highest version that is retired and decrypts, by the leader, who asks a quorum.
    pub async fn retired(&self, process: u32, context: &str, node: Option<u32>) -> Option<Option<u32>> {
        let pending = self.begin(
            process,
            Operation::Retired {
                context: context.to_owned(),
            },
        );
        let request = CleanupRequest {
            context: Some(context.to_owned()),
            dry_run: true,
        };
        let answer = self.admin(node).clean_up_keys(&request, None).await;
        let highest =
            |versions: &[hsm_api::admin::CleanupVersion]| versions.iter().map(|found| found.version).max();
        ended(pending, answer, |answer| Answer::Highest {
            version: highest(&answer.versions),
        })
        .map(|answer| highest(&answer.versions))
    }

    /// All contexts, as one node sees them; and the versions of one of them by their states.
    pub async fn keys(&self, process: u32, node: u32) -> Option<hsm_api::admin::ListKeksResponse> {
        let pending = self.begin(process, Operation::Keys { node });
        let answer = self.client("admin", node).list_keks().await;
        ended(pending, answer, |answer| Answer::Keys {
            contexts: answer.contexts.iter().map(view).collect(),
        })
    }

    /// One version, as one node sees it.
    pub async fn show(&self, process: u32, context: &str, version: u32, node: u32) -> Option<KeyState> {
        let pending = self.begin(
            process,
            Operation::Show {
                context: context.to_owned(),
                version,
                node,
            },
        );
        let answer = match self.client("admin", node).list_keks().await {
            Ok(answer) => answer,
            Err(error) => {
                pending.failed(&error);
                return None;
            }
        };
        let contexts = answer.contexts.iter().filter(|known| known.context == context);
        let mut versions = contexts.flat_map(|known| &known.versions);
        let state = versions
            .find(|known| known.version == version)
            .map(|known| known.state);
        match state {
            Some(state) => pending.answered(Answer::State { state }, &answer.meta),
            None => pending.complete(Outcome::Refused {
                code: "not_listed".to_owned(),
            }),
        }
        state
    }

    /// Takes a version out of use, or puts it back.
    pub async fn set_use(
        &self,
        process: u32,
        (context, version): (&str, u32),
        enable: bool,
        node: Option<u32>,
        key: &str,
    ) -> Option<KeyState> {
        let pending = self.begin(
            process,
            Operation::Use {
                context: context.to_owned(),
                version,
                enable,
                key: key.to_owned(),
            },
        );
        let admin = self.admin(node);
        let answer = if enable {
            admin.enable_key(context, version, Some(key)).await
        } else {
            admin.disable_key(context, version, Some(key)).await
        };
        ended(pending, answer, state).map(|answer| answer.info.state)
    }

    /// Has a version destroyed, through all nodes, under a key of its own.
    pub async fn destroy(&self, process: u32, context: &str, version: u32) -> Option<KeyState> {
        let key = self.key();
        self.destroy_by(process, (context, version), None, &key).await
    }

    /// Has a version destroyed after the shortest wait, however lately it was used.
    pub async fn destroy_by(
        &self,
        process: u32,
        (context, version): (&str, u32),
        node: Option<u32>,
        key: &str,
    ) -> Option<KeyState> {
        let pending = self.begin(
            process,
            Operation::Destroy {
                context: context.to_owned(),
                version,
                key: key.to_owned(),
            },
        );
        let request = DestroyKeyRequest {
            wait_seconds: Some(1),
            override_recent_use: true,
        };
        let answer = self
            .admin(node)
            .destroy_key(context, version, &request, Some(key))
            .await;
        ended(pending, answer, state).map(|answer| answer.info.state)
    }

    /// Takes a destruction back, if it still waits.
    pub async fn undo_destroy(
        &self,
        process: u32,
        (context, version): (&str, u32),
        key: &str,
    ) -> Option<KeyState> {
        let pending = self.begin(
            process,
            Operation::Undo {
                context: context.to_owned(),
                version,
                key: key.to_owned(),
            },
        );
        let answer = self
            .admin(None)
            .undo_destroy_key(context, version, Some(key))
            .await;
        ended(pending, answer, state).map(|answer| answer.info.state)
    }

    /// Until any node calls a version destroyed; false if none does in time.
    pub async fn wait_destroyed(&self, process: u32, context: &str, version: u32, within: Duration) -> bool {
        let begun = tokio::time::Instant::now();
        while begun.elapsed() < within {
            for node in self.running() {
                if self.show(process, context, version, node).await == Some(KeyState::Destroyed) {
                    return true;
                }
            }
            let soon = begun.elapsed() < SOON;
            tokio::time::sleep(if soon { LOOK } else { LATER }).await;
        }
        false
    }
}

fn state(answer: &KeyVersionResponse) -> Answer {
    Answer::State {
        state: answer.info.state,
    }
}

fn view(known: &hsm_api::admin::ContextInfo) -> ContextView {
    let numbers = || known.versions.iter().map(|version| version.version);
    let active = known
        .versions
        .iter()
        .filter(|version| version.state == KeyState::Active);
    ContextView {
        context: known.context.clone(),
        active: active.map(|version| version.version).collect(),
        listed: numbers().count() as u32,
        highest: numbers().max().unwrap_or_default(),
    }
}
