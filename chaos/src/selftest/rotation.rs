//! Versions that are used before everybody has them, that are made twice, and that outlive their destruction.

use std::time::Duration;

use anyhow::{Result, ensure};
use cluster_tests::failpoints::IMPORTS;
use cluster_tests::until;
use hsm_api::admin::KeyState;

use super::scene::{CONTEXT, PROCESS, SOON, Scene, WATCHED};

/// An import that takes so long is still one that a rotation waits for.
const SLOW: Duration = Duration::from_secs(4);

/// Nobody but the leader has the key for a while.
pub(super) async fn two_of_three_tokens_are_slow(scene: &mut Scene) -> Result<()> {
    let leader = scene.leader().await?;
    let slow = scene.others(&[leader]);
    rotate_with_slow(scene, leader, &slow).await
}

/// A majority has the key, and one node that serves has it not for a while.
pub(super) async fn one_of_three_tokens_is_slow(scene: &mut Scene) -> Result<()> {
    let leader = scene.leader().await?;
    let slow = scene.others(&[leader])[0];
    rotate_with_slow(scene, leader, &[slow]).await
}

/// A rotation while the tokens of some take long: what is encrypted as soon as it is acknowledged has to be decrypted by all
/// who serve.
async fn rotate_with_slow(scene: &Scene, leader: u32, slow: &[u32]) -> Result<()> {
    let action = format!("sleep({})", SLOW.as_millis());
    scene.arm(slow, IMPORTS, &action).await?;
    scene.rotate("with-slow-tokens").await?;
    let sealed = scene.seal(leader).await?;
    scene.open_everywhere(&[&sealed]).await;
    tokio::time::sleep(WATCHED).await;
    scene.arm(slow, IMPORTS, "off").await?;
    scene.ready(&scene.cluster.members()).await?;
    scene.open_everywhere(&[&sealed]).await;
    Ok(())
}

/// Whoever has not heard the answer asks again, under the same key.
pub(super) async fn a_rotation_is_asked_for_twice_under_one_key(scene: &mut Scene) -> Result<()> {
    let first = scene.rotate("asked-for-twice").await?;
    let again = scene.rotate("asked-for-twice").await?;
    let sealed = scene.seal(1).await?;
    scene.open_everywhere(&[&sealed]).await;
    ensure!(first == again, "version {first}, then version {again}");
    Ok(())
}

/// The first version is destroyed on every node, and everybody is asked for what was encrypted under it.
pub(super) async fn a_version_is_destroyed(scene: &mut Scene) -> Result<()> {
    let sealed = scene.seal(1).await?;
    scene.rotate("its-successor").await?;
    scene.open_everywhere(&[&sealed]).await;
    scene.clients.destroy(PROCESS, CONTEXT, sealed.version).await;
    // Its row may be gone, and with it any word of its end.
    let node = until("the end of the destruction", SOON, async || {
        for node in scene.cluster.members() {
            if is_over(scene, node, sealed.version).await == Some(true) {
                return Some(node);
            }
        }
        None
    })
    .await?;
    let said = scene.clients.show(PROCESS, CONTEXT, sealed.version, node).await;
    scene.open_everywhere(&[&sealed]).await;
    ensure!(
        said == Some(KeyState::Destroyed),
        "version {} is not said to be destroyed, but {said:?}",
        sealed.version
    );
    Ok(())
}

/// Whether a node lists a version as destroyed, or not at all; if it answers.
async fn is_over(scene: &Scene, node: u32, version: u32) -> Option<bool> {
    let keys = scene.clients.keys(PROCESS, node).await?;
    let contexts = keys.contexts.iter().filter(|known| known.context == CONTEXT);
    let mut versions = contexts.flat_map(|known| &known.versions);
    let state = versions
        .find(|known| known.version == version)
        .map(|known| known.state);
    Some(matches!(state, None | Some(KeyState::Destroyed)))
}
