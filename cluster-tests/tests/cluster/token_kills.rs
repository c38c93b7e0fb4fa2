//! Nodes killed inside `C_Login` and inside the writes of an import: strace does it, in system calls that are
//! counted through, so that every state in which a kill can leave a token's files comes up. Whatever it was, the
//! node comes back by itself with every key.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::lanes::lanes;
use cluster_tests::{Playground, Program, scenario, until};
use hsm_api::client::Retry;

use crate::common::{CONTEXT, check_settled, context_on, open_everywhere, seal};
use crate::pkcs11::{Token, copy_folder, token_folder};
use crate::victim::{
    STARTED, Victim, WRITTEN, acknowledge, cluster_of, forget_objects, inject, objects, only, traced,
};

/// More calls of one kind than a thread makes before the kill that is looked for.
const MOST: u32 = 40;
/// Key versions to import: enough for any thread that imports to import several.
const VERSIONS: usize = 12;

#[test]
fn a_kill_inside_a_write_to_a_token_costs_nothing() -> Result<()> {
    lanes([
        vec![scenario!(
            a_kill_instead_of_any_write_of_the_first_keys_costs_nothing
        )],
        vec![scenario!(a_kill_after_any_write_of_the_first_keys_costs_nothing)],
        vec![
            scenario!(a_kill_inside_any_write_of_an_import_is_made_good_by_importing_again),
            scenario!(a_kill_inside_a_login_costs_no_token),
            scenario!(a_rotation_waits_for_a_node_that_was_killed_in_its_import),
        ],
    ])
}

async fn a_kill_inside_a_login_costs_no_token() -> Result<()> {
    let program = Program::new()?;
    let cluster = cluster_of(&program).await?;
    let acknowledged = acknowledge(&cluster, 1).await?;
    let victim = Victim::of(&cluster, &program).await?;
    let whole = objects(&victim.tokens)?;
    let files: Vec<PathBuf> = ["slot-exchange", "slot-2fa"]
        .into_iter()
        .map(|label| Ok(token_folder(&victim.tokens, label)?.join("token.object")))
        .collect::<Result<_>>()?;
    let filter: String = files.iter().map(|file| only(file)).collect();
    let length = |file: &PathBuf| -> Result<u64> { Ok(fs::metadata(file)?.len()) };
    let lengths = || -> Result<Vec<u64>> { files.iter().map(length).collect() };
    let whole_lengths = lengths()?;

    // C_Login cuts the file to nothing, then writes it anew. Each token is opened by a thread of its own.
    for (file, (call, leaves_empty)) in files
        .iter()
        .flat_map(|file| [("ftruncate", false), ("write", true)].map(|call| (file, call)))
    {
        let mut kills = 0;
        loop {
            let nth = kills + 1;
            let what = format!("{}{}", only(file), inject(call, "KILL", nth));
            ensure!(nth <= MOST, "{what}: no end of it");
            if !victim.dies(&what).await? {
                break;
            }
            kills = nth;
            ensure!(
                (length(file)? == 0) == leaves_empty,
                "{what}: that its file is empty is not {leaves_empty}"
            );
            // The other token was being opened at the same time, and the kill may have met that too.
            let torn = lengths()? != whole_lengths;
            let said = victim.comes_back().await.with_context(|| what.clone())?;
            ensure!(
                said.contains("it was restored from its copy") == torn,
                "{what}: that a file is torn is {torn}: {said}"
            );
            victim.is_whole(whole, &acknowledged).await.context(what)?;
        }
        ensure!(kills >= 1, "{}: no kill in {call}", file.display());
    }

    // Killed once more while the file is put back: the copy is still there.
    ensure!(
        victim
            .dies(&format!("{filter}{}", inject("write", "KILL", 1)))
            .await?,
        "it lives"
    );
    let partial: String = files
        .iter()
        .map(|file| only(&file.with_extension("object.partial")))
        .collect();
    ensure!(
        victim
            .dies(&format!("{partial}{}", inject("rename", "KILL", 1)))
            .await?,
        "it lives"
    );
    ensure!(lengths()?.contains(&0), "the kill came too late");
    let said = victim.comes_back().await?;
    ensure!(said.contains("it was restored from its copy"), "{said}");
    victim.is_whole(whole, &acknowledged).await?;
    cluster.passed();
    Ok(())
}

async fn a_kill_inside_any_write_of_an_import_is_made_good_by_importing_again() -> Result<()> {
    let program = Program::new()?;
    let cluster = cluster_of(&program).await?;
    let acknowledged = acknowledge(&cluster, VERSIONS).await?;
    let victim = Victim::of(&cluster, &program).await?;
    let whole = objects(&victim.tokens)?;
    // Tokens that have everything to import: transport keys by their grants, then the KEKs.
    victim.node.kill().await?;
    let mut forgotten = 0;
    for slot in ["exchange", "2fa"] {
        forgotten += Token::of(&cluster, &victim.node, slot).forget_keys()?;
    }
    ensure!(
        forgotten == VERSIONS as u64 + 3,
        "{forgotten} keys were in the tokens"
    );
    let lacking = cluster.scratch().join("lacking");
    copy_folder(&victim.tokens, &lacking)?;
    let few = objects(&lacking)?;
    let folder = token_folder(&lacking, "slot-exchange")?;
    let folder = victim.tokens.join(folder.file_name().context("no name")?);

    // An object is stored three times, each time cut to nothing and written: empty, complete but no token object
    // yet, final. Between the first two the token's generation is written; at the end all of it is synced.
    let all = String::new();
    let generation = only(&folder.join("generation"));
    let folder_only = only(&folder);
    let mut said = String::new();
    for (filter, call, signal, wanted) in [
        (&all, "ftruncate", "KILL", 3),
        (&all, "ftruncate", "USR1", 3),
        (&generation, "write", "KILL", 2),
        (&folder_only, "fsync", "KILL", 2),
    ] {
        let mut kills_in_imports = 0;
        // strace counts by thread. The first ones are those of the thread that opens the tokens.
        for nth in 1..=MOST {
            victim.node.kill().await?;
            fs::remove_dir_all(&victim.tokens)?;
            copy_folder(&lacking, &victim.tokens)?;
            let what = format!("{filter}{}", inject(call, signal, nth));
            ensure!(
                victim.dies(&what).await?,
                "{what}: it lives, after {kills_in_imports} kills in imports"
            );
            if objects(&victim.tokens)? > few {
                kills_in_imports += 1;
            }
            said += &victim.comes_back().await.with_context(|| what.clone())?;
            victim.is_whole(whole, &acknowledged).await.context(what)?;
            if kills_in_imports == wanted {
                break;
            }
        }
        ensure!(
            kills_in_imports == wanted,
            "{filter}{call}, {signal}: {kills_in_imports} kills in imports"
        );
    }
    // What a kill can leave of an object: nothing of it, no attribute, all but that it is a token object.
    for torn in [
        "cut off",
        "object without class or key type",
        "had not become a token object",
    ] {
        ensure!(said.contains(torn), "{torn:?} never came up");
    }
    cluster.passed();
    Ok(())
}

async fn a_rotation_waits_for_a_node_that_was_killed_in_its_import() -> Result<()> {
    let program = Program::new()?;
    let cluster = cluster_of(&program).await?;
    let mut acknowledged = acknowledge(&cluster, 1).await?;
    let victim = Victim::of(&cluster, &program).await?;
    // The first call that a start without imports does not reach.
    let mut nth = 1;
    while victim.dies(&inject("ftruncate", "KILL", nth)).await? {
        nth += 1;
        ensure!(nth <= MOST, "it dies at every start");
    }
    let leader = cluster.leader().await?;
    let mut cut_short = None;
    for _ in 0..MOST {
        let client = cluster
            .client_on("admin", leader.node)?
            .with_retry(Retry::Until(STARTED));
        let rotation = tokio::spawn(async move { client.rotate(CONTEXT, None).await });
        until("the rotation's end, or the node's", STARTED, async || {
            (rotation.is_finished() || victim.node.pid().is_none()).then_some(())
        })
        .await?;
        if victim.node.pid().is_none() {
            cut_short = Some(rotation);
            break;
        }
        rotation.await??;
        let client = cluster.client_on("trading-1", leader.node)?;
        acknowledged
            .exchange
            .push(seal(&client, CONTEXT, b"exchange").await?);
    }
    let Some(rotation) = cut_short else {
        bail!("it lives after {MOST} rotations");
    };
    victim.is_killed(WRITTEN).await?;
    victim.comes_back().await?;
    let version = rotation.await??.version;
    for node in cluster.nodes() {
        until("the new version on every node", STARTED, async || {
            let info = context_on(&cluster, node.number, CONTEXT).await.ok()?;
            (check_settled(&info).ok()? == version).then_some(())
        })
        .await
        .with_context(|| node.id())?;
        node.wait_ready(STARTED).await?;
        let client = cluster.client_on("trading-1", node.number)?;
        acknowledged
            .exchange
            .push(seal(&client, CONTEXT, b"exchange").await?);
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged.exchange).await?;
    // As many objects as a node has that was never killed.
    let sound = objects(&cluster.node(leader.node).dir.join("tokens"))?;
    victim.is_whole(sound, &acknowledged).await?;
    cluster.passed();
    Ok(())
}

/// A founder that is killed while it makes the slots' first keys: its own key pairs, the transport keys, the
/// first versions. Nobody else has any of it.
async fn first_keys_survive(signal: &str) -> Result<String> {
    let program = Program::new()?;
    let cluster = Playground::builder()
        .nodes(1)
        .unformed()
        .env("HSM_NODE_BIN", program.path())
        .start()
        .await?;
    let node = cluster.node(1);
    node.kill().await?;
    let fresh = cluster.scratch().join("fresh");
    fs::create_dir(&fresh)?;
    let folders = ["data", "tokens"];
    for folder in folders {
        copy_folder(&node.dir.join(folder), &fresh.join(folder))?;
    }
    // As tokens of another tool are: without the key pairs that `slot init` has made in them.
    let empty = forget_objects(&fresh.join("tokens"))?;
    let victim = Victim {
        cluster: &cluster,
        program: &program,
        tokens: node.dir.join("tokens"),
        node,
    };
    // In each slot: its key pair, its transport key, its first version.
    let whole = empty + 6;
    let (mut said, mut among_keys) = (String::new(), 0);
    for nth in 1..=MOST {
        let what = format!("ftruncate {nth}, {signal}");
        victim.node.kill().await?;
        for folder in folders {
            fs::remove_dir_all(victim.node.dir.join(folder))?;
            copy_folder(&fresh.join(folder), &victim.node.dir.join(folder))?;
        }
        if victim.trace().exists() {
            fs::remove_file(victim.trace())?;
        }
        traced(&program, &inject("ftruncate", signal, nth))?;
        // Starts it, founds the cluster, makes the keys; gives up only long after the node is dead.
        let formed = tokio::select! {
            formed = cluster.up() => formed.is_ok(),
            killed = victim.is_killed(STARTED) => killed.is_err(),
        };
        program.plain()?;
        if formed && victim.node.pid().is_some() {
            break;
        }
        victim.is_killed(WRITTEN).await.with_context(|| what.clone())?;
        victim.node.wait_gone(WRITTEN).await?;
        let found = objects(&victim.tokens)?;
        among_keys += usize::from(empty < found && found < whole);
        let before = victim.node.log().len();
        cluster.up().await.with_context(|| what.clone())?;
        said += victim.node.log().get(before..).unwrap_or_default();
        let acknowledged = acknowledge(&cluster, 1).await.with_context(|| what.clone())?;
        // A transport key that was made and not committed is left alone: nobody can tell whose it is.
        let found = objects(&victim.tokens)?;
        ensure!(found >= whole, "{what}: {found} objects instead of {whole}");
        victim.is_whole(found, &acknowledged).await.context(what)?;
    }
    ensure!(among_keys >= 3, "only {among_keys} kills among the keys");
    cluster.passed();
    Ok(said)
}

async fn a_kill_instead_of_any_write_of_the_first_keys_costs_nothing() -> Result<()> {
    first_keys_survive("KILL").await.map(drop)
}

async fn a_kill_after_any_write_of_the_first_keys_costs_nothing() -> Result<()> {
    let said = first_keys_survive("USR1").await?;
    ensure!(said.contains("torn object removed"), "nothing was ever torn");
    Ok(())
}
