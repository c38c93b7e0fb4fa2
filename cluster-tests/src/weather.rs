//! What a relay does to the bytes that pass through it in one direction: delay with jitter, stalls as lost segments make them,
//! resets, a limit of bytes per second. Nothing is reordered and nothing that arrives is missing: to its ends it is a bad TCP
//! connection.

use std::collections::VecDeque;
use std::fmt;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::relay::{Way, Ways};

/// Read at once.
const CHUNK: usize = 16 * 1024;
/// Under way in one direction at most; a sender then waits, as at a full window. Of a slow line it is what passes in a second.
const UNDER_WAY: usize = 1024 * 1024;
/// What comes later than this by the limit of bytes per second is held up by it.
const HELD_UP: Duration = Duration::from_millis(10);

/// See the module; the default does nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Weather {
    /// Everything comes so much later.
    pub delay: Duration,
    /// And up to so much more, drawn for each chunk.
    pub jitter: Duration,
    /// Of a thousand chunks, how many are lost once and sent again.
    pub lost_permille: u32,
    /// After which time.
    pub resent_after: Duration,
    /// Of a thousand chunks, at how many the connection is reset.
    pub reset_permille: u32,
    /// Bytes per second of one connection; `None` is no limit, and less than one is one.
    pub rate: Option<u32>,
}

/// The connection was reset by the weather: its ends have to be told so.
#[derive(Debug)]
pub(crate) struct Reset;

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the connection was reset")
    }
}

impl std::error::Error for Reset {}

impl Weather {
    fn is_calm(&self) -> bool {
        *self == Self::default()
    }
}

/// How many chunks of all relays were treated so.
#[derive(Debug, Default)]
pub struct Touched {
    delayed: AtomicU64,
    lost: AtomicU64,
    reset: AtomicU64,
    slowed: AtomicU64,
}

impl Touched {
    /// Held up by delay or jitter.
    pub fn delayed(&self) -> u64 {
        self.delayed.load(Ordering::Relaxed)
    }

    /// Lost once.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Connections reset.
    pub fn reset(&self) -> u64 {
        self.reset.load(Ordering::Relaxed)
    }

    /// Held up by the limit of bytes per second.
    pub fn slowed(&self) -> u64 {
        self.slowed.load(Ordering::Relaxed)
    }
}

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        let seed = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Self(seed | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) % limit.max(1)
    }

    fn hits(&mut self, permille: u32) -> bool {
        self.below(1000) < u64::from(permille)
    }
}

/// When each chunk is due.
struct Pace {
    dice: Dice,
    /// Of the chunk before: nothing overtakes.
    last: Option<Instant>,
    /// From when on the line is free.
    free: Option<Instant>,
}

enum Due {
    At(Instant),
    Reset,
}

impl Pace {
    fn due(&mut self, bytes: usize, now: Instant, weather: &Weather, touched: &Touched) -> Due {
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        let mut due = now;
        if !weather.is_calm() {
            if self.dice.hits(weather.reset_permille) {
                count(&touched.reset);
                return Due::Reset;
            }
            let micros = u64::try_from(weather.jitter.as_micros()).unwrap_or(u64::MAX - 1);
            let jitter = Duration::from_micros(self.dice.below(micros + 1));
            if !(weather.delay + jitter).is_zero() {
                due += weather.delay + jitter;
                count(&touched.delayed);
            }
            if self.dice.hits(weather.lost_permille) {
                due += weather.resent_after;
                count(&touched.lost);
            }
            if let Some(rate) = weather.rate {
                let free = self.free.map_or(now, |free| free.max(now));
                let takes = Duration::from_secs_f64(bytes as f64 / f64::from(rate.max(1)));
                self.free = Some(free + takes);
                due = due.max(free + takes);
                if free + takes > now + HELD_UP {
                    count(&touched.slowed);
                }
            }
        }
        let due = self.last.map_or(due, |last| last.max(due));
        self.last = Some(due);
        Due::At(due)
    }
}

/// One direction of one connection.
pub(crate) struct Pump<'a> {
    way: Way,
    ways: watch::Receiver<Ways>,
    touched: &'a Touched,
    pace: Pace,
}

impl<'a> Pump<'a> {
    pub(crate) fn new(way: Way, ways: watch::Receiver<Ways>, touched: &'a Touched, seed: u64) -> Self {
        Self {
            way,
            ways,
            touched,
            pace: Pace {
                dice: Dice::new(seed),
                last: None,
                free: None,
            },
        }
    }

    fn due(&mut self, bytes: usize) -> Due {
        let now = Instant::now();
        let ways = self.ways.borrow();
        match ways.weather.get(&self.way) {
            Some(weather) => self.pace.due(bytes, now, weather, self.touched),
            None => self.pace.due(bytes, now, &Weather::default(), self.touched),
        }
    }

    /// How much may be read now, with so much under way: little is left of a slow line when the weather changes.
    fn room(&self, under_way: usize) -> usize {
        let ways = self.ways.borrow();
        let rate = ways.weather.get(&self.way).and_then(|weather| weather.rate);
        let most = rate.map_or(UNDER_WAY, |rate| (rate.max(1) as usize).min(UNDER_WAY));
        most.saturating_sub(under_way).min(CHUNK)
    }

    /// Passes on until the end of the source. Fails when the connection is reset, and once a cut was mended.
    pub(crate) async fn run(
        mut self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
    ) -> Result<()> {
        let way = self.way;
        let mut cuts = self.ways.clone();
        let mut waiting: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let (mut under_way, mut ended) = (0, false);
        let mut buffer = vec![0; CHUNK];
        loop {
            let due = waiting.front().map(|(due, _)| *due);
            let room = self.room(under_way);
            if ended && due.is_none() {
                to.shutdown().await?;
                return Ok(());
            }
            tokio::select! {
                biased;
                () = cut(&mut cuts, way, true) => {
                    cut(&mut cuts, way, false).await;
                    bail!("the link was cut");
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    if let Some((_, bytes)) = waiting.pop_front() {
                        under_way -= bytes.len();
                        to.write_all(&bytes).await?;
                        to.flush().await?;
                    }
                }
                read = from.read(&mut buffer[..room]), if !ended && room > 0 => {
                    let read = match read {
                        // TLS that ends without a goodbye ends all the same, after what was sent.
                        Err(error) if error.kind() == ErrorKind::UnexpectedEof => 0,
                        read => read?,
                    };
                    if read == 0 {
                        ended = true;
                        continue;
                    }
                    match self.due(read) {
                        Due::At(due) => waiting.push_back((due, buffer[..read].to_vec())),
                        Due::Reset => return Err(Reset.into()),
                    }
                    under_way += read;
                }
            }
        }
    }
}

/// Until the way is cut, or mended.
async fn cut(ways: &mut watch::Receiver<Ways>, way: Way, cut: bool) {
    // The sender only goes when the test ends.
    let _ = ways.wait_for(|ways| ways.cuts.contains(&way) == cut).await;
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::pin::Pin;
    use std::task::{self, Poll};

    use tokio::io::{ReadBuf, duplex};

    use super::*;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn pace() -> Pace {
        Pace {
            dice: Dice::new(7),
            last: None,
            free: None,
        }
    }

    /// When so many chunks of a size are due that come at once.
    fn dues(weather: &Weather, chunks: usize, bytes: usize, touched: &Touched) -> Vec<Duration> {
        let (mut pace, now) = (pace(), Instant::now());
        let due = |pace: &mut Pace| match pace.due(bytes, now, weather, touched) {
            Due::At(due) => due - now,
            Due::Reset => panic!("no reset was asked for"),
        };
        (0..chunks).map(|_| due(&mut pace)).collect()
    }

    #[test]
    fn calm_weather_holds_nothing_up() {
        let touched = Touched::default();
        let dues = dues(&Weather::default(), 100, 1000, &touched);
        assert!(dues.iter().all(Duration::is_zero));
        assert_eq!(touched.delayed() + touched.lost() + touched.slowed(), 0);
    }

    #[test]
    fn jitter_never_reorders() {
        let touched = Touched::default();
        let weather = Weather {
            delay: millis(10),
            jitter: millis(50),
            ..Weather::default()
        };
        let dues = dues(&weather, 1000, 10, &touched);
        assert!(dues.is_sorted());
        assert!(dues[0] >= millis(10) && dues[999] <= millis(60));
        assert_eq!(touched.delayed(), 1000);
    }

    #[test]
    fn what_is_lost_comes_later_and_holds_up_what_follows() {
        let touched = Touched::default();
        let weather = Weather {
            lost_permille: 1000,
            resent_after: millis(200),
            ..Weather::default()
        };
        assert_eq!(dues(&weather, 3, 10, &touched), [millis(200); 3]);
        let some = Weather {
            lost_permille: 100,
            ..weather
        };
        let touched = Touched::default();
        dues(&some, 10_000, 10, &touched);
        assert!((800..1200).contains(&touched.lost()), "{}", touched.lost());
    }

    #[test]
    fn a_limit_spreads_bytes_over_time() {
        let touched = Touched::default();
        let weather = Weather {
            rate: Some(1000),
            ..Weather::default()
        };
        assert_eq!(
            dues(&weather, 3, 100, &touched),
            [millis(100), millis(200), millis(300)]
        );
        assert_eq!(touched.slowed(), 3);
        // Whoever has the line for himself and sends little is not held up.
        let wide = Weather {
            rate: Some(1_000_000),
            ..Weather::default()
        };
        dues(&wide, 3, 100, &touched);
        assert_eq!(touched.slowed(), 3);
    }

    #[test]
    fn little_is_left_of_a_slow_line_when_the_weather_changes() {
        let (ways, receiver) = watch::channel(Ways::default());
        ways.send_modify(|ways| {
            let weather = Weather {
                rate: Some(1000),
                ..Weather::default()
            };
            ways.weather.insert((1, 2), weather);
        });
        let touched = Touched::default();
        let pump = Pump::new((1, 2), receiver, &touched, 1);
        assert_eq!(pump.room(0), 1000);
        assert_eq!(pump.room(900), 100);
        assert_eq!(pump.room(1000), 0);
        ways.send_modify(|ways| ways.weather.clear());
        assert_eq!(pump.room(1000), CHUNK);
        assert_eq!(pump.room(UNDER_WAY), 0);
    }

    #[test]
    fn a_reset_is_one() {
        let touched = Touched::default();
        let weather = Weather {
            reset_permille: 1000,
            ..Weather::default()
        };
        let due = pace().due(1, Instant::now(), &weather, &touched);
        assert!(matches!(due, Due::Reset));
        assert_eq!(touched.reset(), 1);
    }

    #[tokio::test]
    async fn everything_arrives_in_order_and_the_end_too() {
        let (ways, receiver) = watch::channel(Ways::default());
        ways.send_modify(|ways| {
            let weather = Weather {
                delay: millis(1),
                jitter: millis(3),
                ..Weather::default()
            };
            ways.weather.insert((1, 2), weather);
        });
        let touched = Touched::default();
        let (mut sender, from) = duplex(4096);
        let (to, mut reader) = duplex(4096);
        let sent: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8).collect();
        let wanted = sent.clone();
        let pump = Pump::new((1, 2), receiver, &touched, 1);
        let mut got = Vec::new();
        let (pumped, written, read) = tokio::join!(
            pump.run(from, to),
            async {
                sender.write_all(&sent).await.unwrap();
                sender.shutdown().await
            },
            reader.read_to_end(&mut got)
        );
        pumped.unwrap();
        written.unwrap();
        read.unwrap();
        assert_eq!(got, wanted);
        assert!(touched.delayed() > 0);
    }

    /// TLS whose peer has closed the connection without a goodbye.
    struct Gone;

    impl AsyncRead for Gone {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut task::Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<std::io::Result<()>> {
            Poll::Ready(Err(ErrorKind::UnexpectedEof.into()))
        }
    }

    #[tokio::test]
    async fn last_words_arrive_without_a_goodbye() {
        let (_ways, receiver) = watch::channel(Ways::default());
        let touched = Touched::default();
        for seed in 0..20 {
            let (to, mut reader) = duplex(4096);
            let pump = Pump::new((1, 2), receiver.clone(), &touched, seed);
            let mut got = String::new();
            let (pumped, read) = tokio::join!(
                pump.run(b"go away".chain(Gone), to),
                reader.read_to_string(&mut got)
            );
            pumped.unwrap();
            read.unwrap();
            assert_eq!(got, "go away");
        }
    }

    #[tokio::test]
    async fn a_way_that_is_cut_is_silent_and_ends_when_it_is_mended() {
        let (ways, receiver) = watch::channel(Ways::default());
        let touched = Touched::default();
        let (mut sender, from) = duplex(4096);
        let (to, mut reader) = duplex(4096);
        let pump = Pump::new((1, 2), receiver, &touched, 1);
        let play = async {
            sender.write_all(b"before").await.unwrap();
            let mut got = [0; 6];
            reader.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"before");
            ways.send_modify(|ways| {
                ways.cuts.insert((1, 2));
            });
            sender.write_all(b"lost").await.unwrap();
            let silent = tokio::time::timeout(millis(50), reader.read_u8()).await;
            assert!(silent.is_err(), "{silent:?}");
            ways.send_modify(|ways| ways.cuts.clear());
        };
        let (pumped, ()) = tokio::join!(pump.run(from, to), play);
        assert!(pumped.unwrap_err().to_string().contains("cut"));
    }
}
