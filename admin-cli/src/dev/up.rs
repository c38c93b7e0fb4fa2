//! `hsmctl dev up` and `dev start`: makes what is missing, starts what does not run, forms what is not
//! formed. The same command again continues wherever the last one ended.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use super::down::PATIENCE;
use super::layout::{Facts, Layout, MAX_NODES, Node};
use super::{Place, Start, config, env, form, pki, ports, process, ready, status, tokens};
use crate::commands::slot::DEFAULT_MODULE;
use crate::commands::{Session, on_runtime};
use crate::exit::{usage, with_hint};
use crate::files;
use crate::output::note;
use crate::progress::{Progress, patiently};

const DEFAULT_NODES: u32 = 3;
const DEFAULT_PORT: u16 = 8443;
/// A node opens its store and its tokens before it listens.
const LIVE: Duration = Duration::from_secs(30);
const READY: Duration = Duration::from_secs(60);

/// Arguments of `dev up`.
#[derive(Debug, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    place: Place,
    /// How many nodes [default: 3, or as many as there are]; more than before adds nodes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_NODES)))]
    nodes: Option<u32>,
    /// API port of node 1; its health and cluster ports follow, the next node's are 10 higher
    /// [default: 8443, or as before].
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    base_port: Option<u16>,
    /// The PKCS#11 module of new nodes.
    #[arg(long, env = "HSM_PKCS11_LIB", value_name = "FILE", default_value = DEFAULT_MODULE)]
    module: PathBuf,
    /// Tell peers the port this much above each cluster port: a relay has to stand there. For tests.
    #[arg(long, value_name = "N", hide = true)]
    relay_offset: Option<u16>,
    /// Give node I the address A.B.C.I, where whoever starts it has put it. For tests.
    #[arg(long, value_name = "A.B.C", value_parser = parse_subnet, hide = true)]
    subnet: Option<[u8; 3]>,
    /// Only start the nodes; init, join and keys are left to the caller. For tests.
    #[arg(long, hide = true)]
    no_form: bool,
    /// Start no node either. For tests.
    #[arg(long, hide = true)]
    prepare_only: bool,
    /// Copy tokens and their PINs from this playground, which has never run. For tests: making a token's key pair
    /// takes longer than all the rest.
    #[arg(long, value_name = "DIR", hide = true)]
    tokens_from: Option<PathBuf>,
}

pub(super) fn up(session: &Session, args: &Up) -> Result<()> {
    files::harden()?;
    let layout = Layout::create(&args.place.dir)?;
    let _lock = layout.lock()?;
    let before = layout.facts()?;
    let facts = match before {
        // Nobody has certificates yet: what was asked for before goes on to be wished for, and binds nobody.
        Some(wished) if !layout.pki().exists() => Facts::new(
            args.nodes.unwrap_or(wished.nodes),
            args.base_port.unwrap_or(wished.base_port),
            args.relay_offset.unwrap_or(wished.relay_offset),
        ),
        before => decide(before, args.nodes, args.base_port, args.relay_offset),
    };
    let mut facts = facts.map_err(|error| usage(format!("{error:#}")))?;
    if args.subnet.is_some() && args.subnet != facts.subnet {
        if layout.pki().exists() {
            return Err(usage(
                "--subnet: this playground has certificates already, of other addresses",
            ));
        }
        facts.subnet = args.subnet;
    }
    check_module(&args.module)?;
    let nodes = layout.nodes(facts)?;
    let stopped: Vec<&Node> = nodes
        .iter()
        .filter(|node| process::running(node).is_none())
        .collect();
    if !args.prepare_only {
        stopped.iter().try_for_each(|node| ports::check_free(node))?;
    }
    // Not before this: what is remembered cannot be asked for otherwise.
    if before != Some(facts) {
        layout.remember(facts)?;
    }
    let pool = args.tokens_from.as_deref().map(Layout::open).transpose()?;
    prepare(&layout, facts, &nodes, &args.module, pool.as_ref())?;
    if args.prepare_only {
        return Ok(());
    }
    on_runtime(async {
        let begun = start_all(&layout, &stopped).await?;
        if args.no_form {
            return Ok(());
        }
        form::form(&layout, &nodes).await?;
        patiently(
            "until every node is ready",
            ready::wait_ready(&nodes, &begun, READY),
        )
        .await
    })?
    .map_err(|error| {
        let dir = args.place.dir.display();
        let hint = format!(
            "the nodes that run were left running: the same command again continues, and \
             `hsmctl dev down --dir {dir}` stops them"
        );
        with_hint(error, hint)
    })?;
    note(&format!("talk to it with: . {}", layout.env_file().display()));
    status::print(session, &nodes)
}

pub(super) fn start(args: &Start) -> Result<()> {
    files::harden()?;
    let (layout, facts) = Layout::open(&args.place.dir)?;
    let _lock = layout.lock()?;
    let node = layout.node(facts, args.node)?;
    if let Some(pid) = process::running(&node) {
        if !on_runtime(ready::is_draining(&node))? {
            note(&format!("node {} runs already (pid {pid})", node.number));
            return Ok(());
        }
        note(&format!(
            "node {}: shutting down, started when it has ended",
            node.number
        ));
        let progress = Progress::of(&format!("node {}: finishes its requests", node.number));
        let gone = process::wait_until_gone(&node, PATIENCE);
        drop(progress);
        if !gone {
            bail!(
                "node {}: still shutting down after {PATIENCE:?} (pid {pid})",
                node.number
            );
        }
    }
    if !node.config().exists() {
        bail!(
            "node {}: not made yet; continue with: hsmctl dev up --dir {}",
            node.number,
            args.place.dir.display()
        );
    }
    ports::check_free(&node)?;
    on_runtime(start_all(&layout, &[&node]))?.map(drop)
}

/// What is remembered and what is asked for have to agree, except that nodes may be added.
fn decide(
    before: Option<Facts>,
    nodes: Option<u32>,
    base_port: Option<u16>,
    relay_offset: Option<u16>,
) -> Result<Facts> {
    let Some(before) = before else {
        return Facts::new(
            nodes.unwrap_or(DEFAULT_NODES),
            base_port.unwrap_or(DEFAULT_PORT),
            relay_offset.unwrap_or(0),
        );
    };
    if let Some(port) = base_port.filter(|port| *port != before.base_port) {
        bail!(
            "--base-port {port}: this playground was made with {}, which its members know each other by; leave the \
             option out, or name another folder",
            before.base_port
        );
    }
    if relay_offset.is_some_and(|offset| offset != before.relay_offset) {
        bail!(
            "--relay-offset: this playground was made with {}",
            before.relay_offset
        );
    }
    let nodes = nodes.unwrap_or(before.nodes);
    if nodes < before.nodes {
        bail!(
            "--nodes {nodes}: this playground has {}; stop single ones with: hsmctl dev kill",
            before.nodes
        );
    }
    let facts = Facts::new(nodes, before.base_port, before.relay_offset)?;
    Ok(Facts {
        subnet: before.subnet,
        ..facts
    })
}

/// `10.77.0`.
fn parse_subnet(text: &str) -> Result<[u8; 3], String> {
    let bytes: Vec<u8> = text.split('.').map_while(|word| word.parse().ok()).collect();
    match <[u8; 3]>::try_from(bytes) {
        Ok(subnet) if text.split('.').count() == 3 => Ok(subnet),
        _ => Err(format!(
            "{text}: not the first three numbers of an IPv4 address, such as 10.77.0"
        )),
    }
}

fn check_module(module: &Path) -> Result<()> {
    if !module.is_file() {
        bail!(
            "PKCS#11 module {}: no such file; install SoftHSM (Debian: apt-get install softhsm2), or name the module \
             with --module",
            module.display()
        );
    }
    Ok(())
}

/// Certificates, configurations, tokens, secrets, the env file: whatever is missing.
fn prepare(
    layout: &Layout,
    facts: Facts,
    nodes: &[Node],
    module: &Path,
    pool: Option<&tokens::Pool>,
) -> Result<()> {
    files::private_dir(&layout.secrets())?;
    pki::ensure(layout, facts)?;
    let replication_key = layout.replication_key_file();
    if !replication_key.exists() {
        let key = hsm_core::replication::ReplicationKey::generate()?;
        files::write(&replication_key, key.to_hex().as_bytes())?;
    }
    for node in nodes {
        files::private_dir(&node.dir)?;
        config::ensure(layout, node, module)?;
    }
    tokens::ensure(layout, nodes, module, pool)?;
    env::write(layout, facts)
}

/// Starts nodes, and says where in their logs that is.
async fn start_all(layout: &Layout, stopped: &[&Node]) -> Result<ready::Begun> {
    let begun: ready::Begun = stopped.iter().map(|node| (node.number, node.log_end())).collect();
    let mut started: Vec<(&Node, Child)> = Vec::with_capacity(stopped.len());
    for node in stopped {
        note(&format!(
            "node {}: starts, log in {}",
            node.number,
            node.log().display()
        ));
        started.push((node, process::spawn(layout, node)?));
    }
    for (node, child) in &mut started {
        let what = format!("node {}: opens its store and its tokens", node.number);
        patiently(&what, ready::wait_live(node, Some(child), &begun, LIVE)).await?;
    }
    Ok(begun)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;
    use crate::cli::Global;
    use crate::exit::Exit;

    fn facts(nodes: u32, port: u16) -> Facts {
        Facts::new(nodes, port, 0).unwrap()
    }

    #[test]
    fn a_new_playground_has_three_nodes_from_8443() {
        assert_eq!(decide(None, None, None, None).unwrap(), facts(3, 8443));
        assert_eq!(decide(None, Some(5), Some(9000), None).unwrap(), facts(5, 9000));
    }

    #[test]
    fn an_existing_one_is_continued_and_may_grow() {
        let before = Some(facts(3, 9000));
        assert_eq!(decide(before, None, None, None).unwrap(), facts(3, 9000));
        assert_eq!(decide(before, Some(3), Some(9000), None).unwrap(), facts(3, 9000));
        assert_eq!(decide(before, Some(4), None, None).unwrap(), facts(4, 9000));
    }

    #[test]
    fn a_subnet_is_three_numbers_and_stays() {
        assert_eq!(parse_subnet("10.77.0"), Ok([10, 77, 0]));
        for text in ["", "10.77", "10.77.0.1", "10.77.256", "10.77.x", "10..0"] {
            assert!(parse_subnet(text).is_err(), "{text}");
        }
        let before = Facts {
            subnet: Some([10, 77, 0]),
            ..facts(3, 9000)
        };
        assert_eq!(
            decide(Some(before), Some(4), None, None).unwrap().subnet,
            before.subnet
        );
    }

    #[test]
    fn what_contradicts_an_existing_one_is_refused() {
        let before = Some(facts(3, 9000));
        assert!(
            decide(before, Some(2), None, None)
                .unwrap_err()
                .to_string()
                .contains("dev kill")
        );
        assert!(
            decide(before, None, Some(8443), None)
                .unwrap_err()
                .to_string()
                .contains("9000")
        );
        assert!(decide(before, None, None, Some(5)).is_err());
    }

    #[test]
    fn a_missing_module_says_what_to_install() {
        let error = check_module(Path::new("/nonexistent.so")).unwrap_err();
        assert!(error.to_string().contains("apt-get install softhsm2"), "{error}");
    }

    fn asked(dir: &Path, module: &Path, base_port: u16) -> Up {
        Up {
            place: Place { dir: dir.to_owned() },
            nodes: Some(1),
            base_port: Some(base_port),
            module: module.to_owned(),
            relay_offset: None,
            subnet: None,
            no_form: true,
            prepare_only: false,
            tokens_from: None,
        }
    }

    /// A newcomer whose first try fails must be able to ask for something else.
    #[test]
    fn what_could_not_be_made_is_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let session = Session::new(Global::default());
        let file = dir.path().join("module.so");
        std::fs::write(&file, "").unwrap();
        let play = dir.path().join("play");
        let remembered = || Layout::create(&play).unwrap().facts().unwrap();

        let error = up(&session, &asked(&play, Path::new("/nonexistent.so"), 9000)).unwrap_err();
        assert!(error.to_string().contains("softhsm2"), "{error}");
        assert_eq!(remembered(), None);
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = up(&session, &asked(&play, &file, port)).unwrap_err();
        assert!(error.to_string().contains(&format!("port {port}")), "{error}");
        assert_eq!(remembered(), None);

        // One that was cut short before it had certificates is bound to nothing either.
        Layout::create(&play).unwrap().remember(facts(3, 9000)).unwrap();
        let error = up(&session, &asked(&play, Path::new("/nonexistent.so"), 9100)).unwrap_err();
        assert!(error.to_string().contains("softhsm2"), "{error}");
        std::fs::create_dir(play.join("pki")).unwrap();
        let error = up(&session, &asked(&play, Path::new("/nonexistent.so"), 9100)).unwrap_err();
        assert!(error.to_string().contains("--base-port"), "{error}");
        assert_eq!(Exit::of(&error), Exit::Usage);
    }
}
