//! `hsmctl cluster token`: a secret that lets one node join, shown once.

use anyhow::Result;
use clap::Args;
use hsm_api::admin::JoinTokenRequest;

use super::preview::{self, Preview};
use super::{CHANGE, Session};
use crate::exit::repeatable_failed;
use crate::output::{self, note};

/// Arguments of `cluster token`.
#[derive(Debug, Args)]
pub(crate) struct Token {
    /// How long the token lives; nodes have a default and a maximum.
    #[arg(long, value_name = "SECONDS")]
    ttl: Option<u64>,
    /// Only the node of this name may use it.
    #[arg(long, value_name = "NODE_ID")]
    node: Option<String>,
    /// Say whether a token could be made, and make none.
    #[arg(long)]
    dry_run: bool,
}

pub(super) async fn token(session: &Session, args: Token) -> Result<()> {
    let client = session.client(CHANGE)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        preview::check_leader(session, &client).await?;
        return foresee(&args).print(session);
    }
    let request = JoinTokenRequest {
        ttl_seconds: args.ttl,
        node_id: args.node,
    };
    let answer = session
        .ask(&client, "cluster token", client.create_join_token(&request))
        .await
        .map_err(repeatable_failed)?;
    let made = &answer.body;
    note("the token lets one node join: whoever has it can use it; it is shown once");
    output::print(session.format(), made, || {
        output::pairs([
            ("token", made.token.expose().to_owned()),
            ("cluster-ca-sha256", made.cluster_ca_sha256.clone()),
            ("expires", made.expires_at.clone()),
        ])
    })
}

fn foresee(args: &Token) -> Preview {
    let whom = args.node.as_deref().unwrap_or("any one node");
    let long = match args.ttl {
        Some(seconds) => format!("{seconds} s"),
        None => "the nodes' default time".to_owned(),
    };
    let preview = Preview::new(format!(
        "make a token with which {whom} could join, good for {long}"
    ));
    match args.ttl {
        Some(_) => preview.not_checked("whether the nodes allow it to live that long"),
        None => preview,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_says_for_whom_and_for_how_long() {
        let would = |ttl: Option<u64>, node: Option<&str>| {
            let args = Token {
                ttl,
                node: node.map(str::to_owned),
                dry_run: true,
            };
            serde_json::to_value(foresee(&args)).unwrap()["would"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        assert_eq!(
            would(Some(60), Some("hsm-node-2")),
            "make a token with which hsm-node-2 could join, good for 60 s"
        );
        assert!(would(None, None).contains("any one node"));
    }
}
