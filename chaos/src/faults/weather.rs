//! Bad lines between the nodes, by the relays.

use std::time::Duration;

use anyhow::Result;
use cluster_tests::Weather;

use super::Done;
use crate::cluster::Cluster;

/// Until TCP sends again what was lost: its shortest time is 200 ms.
const RESENT_AFTER: Duration = Duration::from_millis(250);

async fn on_all(weather: Weather, lasts: Duration, cluster: &Cluster) -> Result<()> {
    let relays = cluster.playground().relays()?;
    relays.set_weather_everywhere(&weather);
    tokio::time::sleep(lasts).await;
    relays.calm();
    Ok(())
}

fn millis(millis: u32) -> Duration {
    Duration::from_millis(u64::from(millis))
}

pub(super) async fn delay(delay_ms: u32, jitter_ms: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let touched = cluster.playground().relays()?.touched();
    let before = touched.delayed();
    let weather = Weather {
        delay: millis(delay_ms),
        jitter: millis(jitter_ms),
        ..Weather::default()
    };
    on_all(weather, lasts, cluster).await?;
    let count = touched.delayed() - before;
    let target = format!("all links, {delay_ms} ms and up to {jitter_ms} ms more: {count} chunks");
    Ok(Done::counted_if(count > 0, target, "nothing was sent"))
}

pub(super) async fn loss(
    lost_permille: u32,
    reset_permille: u32,
    lasts: Duration,
    cluster: &Cluster,
) -> Result<Done> {
    let touched = cluster.playground().relays()?.touched();
    let before = (touched.lost(), touched.reset());
    let weather = Weather {
        lost_permille,
        resent_after: RESENT_AFTER,
        reset_permille,
        ..Weather::default()
    };
    on_all(weather, lasts, cluster).await?;
    let (lost, reset) = (touched.lost() - before.0, touched.reset() - before.1);
    let target = format!("all links: {lost} chunks lost once, {reset} connections reset");
    Ok(Done::counted_if(lost + reset > 0, target, "nothing was lost"))
}

pub(super) async fn rate(bytes_per_second: u32, lasts: Duration, cluster: &Cluster) -> Result<Done> {
    let touched = cluster.playground().relays()?.touched();
    let before = touched.slowed();
    let weather = Weather {
        rate: Some(bytes_per_second),
        ..Weather::default()
    };
    on_all(weather, lasts, cluster).await?;
    let count = touched.slowed() - before;
    let target = format!("all links, {bytes_per_second} bytes/s: {count} chunks");
    Ok(Done::counted_if(count > 0, target, "nothing was sent"))
}
