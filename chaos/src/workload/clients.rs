//! The calls of the workload, one method each: an operation is written down before it is sent and when its outcome is known.
//! Through one node it is sent once; through all of them it is repeated with the same `Idempotency-Key`.

mod keys;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use cluster_tests::{Identity, Node};
use hsm_api::admin::{AclDocument, RevocationMatch, RevokeRequest, SetAclRequest, UnrevokeRequest};
use hsm_api::client::{Answer as Answered, Retry};
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Base64, Client, ClientError};

use super::access;
use super::client_of;
use crate::cluster::Cluster;
use crate::history::{Answer, Operation, Outcome, Pending, Recorder, plaintext};

/// Of a call through all nodes: a leader is elected meanwhile.
const PATIENCE: Duration = Duration::from_secs(15);
const PROFILES: [&str; 3] = ["admin", "trading-1", "2fa-1"];

/// A ciphertext that was handed out.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// Its context.
    pub context: String,
    /// Its version.
    pub version: u32,
    /// Number of its plaintext.
    pub number: u64,
    /// Itself.
    pub ciphertext: Base64,
}

/// What came of decrypting one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    /// What went in came out.
    Right,
    /// Something else came out.
    Wrong,
    /// It was refused, with this code.
    Refused(String),
    /// There was no answer.
    Unknown,
}

struct Inner {
    recorder: Recorder,
    nodes: Vec<Node>,
    pki: cluster_tests::Pki,
    /// By profile and node, each request sent once.
    single: BTreeMap<(&'static str, u32), Client>,
    /// As the administrator, through all nodes.
    patient: Client,
}

/// See the module. Clones share everything.
#[derive(Clone)]
pub struct Clients(Arc<Inner>);

impl Clients {
    /// Of all nodes, and of those that may join.
    ///
    /// # Errors
    /// Certificates of the playground that cannot be read.
    pub fn of(cluster: &Cluster, recorder: &Recorder) -> Result<Self> {
        let playground = cluster.playground();
        let pki = playground.pki();
        let nodes: Vec<Node> = (1..=cluster.most())
            .map(|number| playground.node(number))
            .collect();
        let mut single = BTreeMap::new();
        for profile in PROFILES {
            let identity = pki.identity(profile)?;
            for node in &nodes {
                let client = pki.client(Some(&identity), &[node.endpoint()])?;
                single.insert((profile, node.number), client);
            }
        }
        let endpoints: Vec<String> = nodes.iter().map(Node::endpoint).collect();
        let patient = pki.client(Some(&pki.identity("admin")?), &endpoints)?;
        Ok(Self(Arc::new(Inner {
            recorder: recorder.clone(),
            nodes,
            pki,
            single,
            patient: patient.with_retry(Retry::Until(PATIENCE)),
        })))
    }

    /// Where everything is written down.
    #[must_use]
    pub fn recorder(&self) -> &Recorder {
        &self.0.recorder
    }

    /// A key that no other request has.
    #[must_use]
    pub fn key(&self) -> String {
        format!("chaos-{}", self.0.recorder.number())
    }

    /// Numbers of the nodes whose process lives.
    #[must_use]
    pub fn running(&self) -> Vec<u32> {
        let running = self.0.nodes.iter().filter(|node| node.pid().is_some());
        running.map(|node| node.number).collect()
    }

    fn begin(&self, process: u32, operation: Operation) -> Pending {
        self.0.recorder.invoke(process, operation)
    }

    fn client(&self, profile: &'static str, node: u32) -> &Client {
        // A number of nobody is answered by nobody as well.
        self.0.single.get(&(profile, node)).unwrap_or(&self.0.patient)
    }

    fn admin(&self, node: Option<u32>) -> &Client {
        node.map_or(&self.0.patient, |node| self.client("admin", node))
    }

    /// Encrypts the next plaintext.
    pub async fn seal(&self, process: u32, context: &str, node: u32) -> Option<Sealed> {
        let number = self.0.recorder.number();
        let text = plaintext(self.0.recorder.marker(), number);
        let pending = self.begin(
            process,
            Operation::Encrypt {
                context: context.to_owned(),
                number,
                node,
            },
        );
        let request = EncryptRequest::new(context, text.into_bytes());
        match self.client(client_of(context), node).encrypt(&request).await {
            Ok(answer) => {
                let sealed = Sealed {
                    context: context.to_owned(),
                    version: answer.key_version,
                    number,
                    ciphertext: answer.ciphertext.clone(),
                };
                let ciphertext = sealed.ciphertext.to_string();
                let version = sealed.version;
                pending.answered(Answer::Sealed { version, ciphertext }, &answer.meta);
                Some(sealed)
            }
            Err(error) => {
                pending.failed(&error);
                None
            }
        }
    }

    /// Decrypts what was handed out.
    pub async fn open(&self, process: u32, node: u32, sealed: &Sealed) -> Opened {
        let pending = self.begin(
            process,
            Operation::Decrypt {
                context: sealed.context.clone(),
                version: sealed.version,
                number: sealed.number,
                node,
            },
        );
        let request = DecryptRequest::new(sealed.context.clone(), sealed.ciphertext.clone());
        match self
            .client(client_of(&sealed.context), node)
            .decrypt(&request)
            .await
        {
            Ok(answer) => {
                let wanted = plaintext(self.0.recorder.marker(), sealed.number);
                let right = answer.plaintext.as_slice() == wanted.as_bytes();
                pending.answered(Answer::Opened { right }, &answer.meta);
                if right { Opened::Right } else { Opened::Wrong }
            }
            Err(error) => {
                let outcome = Outcome::of(&error);
                pending.complete(outcome.clone());
                match outcome {
                    Outcome::Refused { code } => Opened::Refused(code),
                    _ => Opened::Unknown,
                }
            }
        }
    }

    /// Access control, as one node sees it.
    pub async fn read_acl(&self, process: u32, node: u32) -> Option<AclDocument> {
        let pending = self.begin(process, Operation::ReadAcl { node });
        let answer = self.client("admin", node).acl().await;
        ended(pending, answer, |acl| Answer::Value {
            value: access::value_of(acl),
        })
    }

    /// Puts a value into access control, in the place of what was read. Whether it is done.
    pub async fn set_acl(
        &self,
        process: u32,
        read: &AclDocument,
        to: u64,
        node: Option<u32>,
        key: &str,
    ) -> bool {
        let pending = self.begin(
            process,
            Operation::SetAcl {
                from: access::value_of(read),
                to,
                key: key.to_owned(),
            },
        );
        let request = SetAclRequest {
            acl: access::with_value(read, to),
            dry_run: false,
        };
        let answer = self.admin(node).set_acl(&request, Some(key)).await;
        ended(pending, answer, |_| Answer::Done).is_some()
    }

    /// Revokes a common name, or takes that back. Whether it is done.
    pub async fn set_revoked(&self, process: u32, cn: &str, revoked: bool, node: Option<u32>) -> bool {
        let what = Some(RevocationMatch {
            cn: Some(cn.to_owned()),
            ..RevocationMatch::default()
        });
        let (admin, cn) = (self.admin(node), cn.to_owned());
        if revoked {
            let pending = self.begin(process, Operation::Revoke { cn });
            let request = RevokeRequest {
                what,
                certificate: None,
                reason: "chaos".to_owned(),
            };
            ended(pending, admin.revoke(&request).await, |_| Answer::Done).is_some()
        } else {
            let pending = self.begin(process, Operation::Unrevoke { cn });
            let certificate = None;
            let request = UnrevokeRequest { what, certificate };
            ended(pending, admin.unrevoke(&request).await, |_| Answer::Done).is_some()
        }
    }

    /// A new client of the playground's CA, who may encrypt.
    ///
    /// # Errors
    /// A CA that cannot be read.
    pub fn issue(&self, cn: &str) -> Result<Vec<(u32, Client)>> {
        let identity: Identity = self.0.pki.issue(cn, Some("Trading"))?;
        let nodes = self.0.nodes.iter();
        nodes
            .map(|node| {
                Ok((
                    node.number,
                    self.0.pki.client(Some(&identity), &[node.endpoint()])?,
                ))
            })
            .collect()
    }

    /// Encrypts as somebody of whom only that is asked.
    pub async fn ask(&self, process: u32, cn: &str, (node, client): (u32, &Client)) -> Outcome {
        let cn = cn.to_owned();
        let pending = self.begin(process, Operation::Ask { cn, node });
        match client
            .encrypt(&EncryptRequest::new(super::CONTEXTS[0], b"asked"))
            .await
        {
            Ok(answer) => {
                pending.answered(Answer::Done, &answer.meta);
                Outcome::Ok(Answer::Done)
            }
            Err(error) => {
                let outcome = Outcome::of(&error);
                pending.complete(outcome.clone());
                outcome
            }
        }
    }
}

/// Writes an outcome down; gives the answer.
fn ended<T>(
    pending: Pending,
    outcome: Result<Answered<T>, ClientError>,
    answer: impl FnOnce(&T) -> Answer,
) -> Option<T> {
    match outcome {
        Ok(answered) => {
            pending.answered(answer(&answered.body), &answered.meta);
            Some(answered.body)
        }
        Err(error) => {
            pending.failed(&error);
            None
        }
    }
}
