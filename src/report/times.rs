//! What an image's transfer waited for, and for how long.
//!
//! The loops know it anyway: a round that moved nothing found no data, or no room. Each loop says
//! so once a round, and the time until it says so again counts as that. This is one look at the
//! clock (some 25 ns) in a round that takes 10 µs and more.

use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

/// Shorter phases are not worth a person's time.
const NOTICEABLE: Duration = Duration::from_millis(50);

/// The cause of a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// Data flows.
    No,
    /// The shards have no room, or no data.
    ForShards,
    /// CRIU has no data, or takes none.
    ForCriu,
}

/// A part of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// The application is frozen, or its memory is not copied yet.
    Frozen,
    /// The rest of a captured image goes to the shards.
    Written,
    /// An image comes from the shards, and CRIU cannot connect yet.
    Received,
    /// CRIU can connect.
    Served,
}

/// The time that a phase took. Where it went adds up to all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct PhaseTime {
    phase: Phase,
    #[serde(rename = "moving_millis", serialize_with = "millis")]
    moving: Duration,
    #[serde(rename = "waiting_for_shards_millis", serialize_with = "millis")]
    for_shards: Duration,
    #[serde(rename = "waiting_for_criu_millis", serialize_with = "millis")]
    for_criu: Duration,
    /// For how long each shard had no room, or no data, while others may have had some.
    #[serde(rename = "each_shard_millis", serialize_with = "all_millis")]
    shards: Vec<Duration>,
}

fn millis<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(time.as_millis() as u64)
}

fn all_millis<S: Serializer>(times: &[Duration], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(times.iter().map(|time| time.as_millis() as u64))
}

impl PhaseTime {
    fn whole(&self) -> Duration {
        self.moving + self.for_shards + self.for_criu
    }

    /// A shard that was slow for at least twice as long as every other.
    fn slow_shard(&self) -> Option<usize> {
        let mut slowest: Vec<_> = (0..self.shards.len()).collect();
        slowest.sort_by_key(|&shard| std::cmp::Reverse(self.shards[shard]));
        match slowest[..] {
            [one, next, ..] if self.shards[one] / 2 >= self.shards[next] => Some(one),
            _ => None,
        }
    }

    /// What took most of the time, and what to do about it.
    fn sentence(&self, labels: &[String]) -> String {
        let (took, help) = match self.phase {
            Phase::Frozen => (
                "the application was frozen for",
                "all shards were full: more shards, a faster compressor, or --buffer",
            ),
            Phase::Written => (
                "writing the rest of the image took",
                "all shards were full: more shards, or a faster compressor",
            ),
            Phase::Received => (
                "receiving the image took",
                "all shards were empty: more shards, or a faster download",
            ),
            Phase::Served => (
                "CRIU's part took",
                "CRIU waited for data of the shards: more shards, or a faster download",
            ),
        };
        let (state, criu) = match self.phase {
            Phase::Frozen | Phase::Written => {
                ("full", "had no more data yet: its log says what it did")
            }
            Phase::Received | Phase::Served => (
                "empty",
                "read no faster: with --lazy-pages the application runs at once",
            ),
        };
        let most = self.whole() / 2;
        let (time, why) = match self.slow_shard() {
            Some(shard) if self.for_shards >= most => {
                let why = format!(
                    "{} was {state}, and others were not: see what slows it",
                    labels[shard]
                );
                (self.shards[shard], format!("because {why}"))
            }
            None if self.for_shards >= most => (self.for_shards, format!("because {help}")),
            _ if self.for_criu >= most => (self.for_criu, format!("because CRIU {criu}")),
            _ => (
                self.moving,
                "in which data flowed: a faster machine is all that helps".into(),
            ),
        };
        let (whole, time) = (self.whole().as_secs_f64(), time.as_secs_f64());
        format!("{took} {whole:.1} s, {time:.1} s of it {why}")
    }
}

/// The phases of a transfer, each with its times.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Times(Vec<PhaseTime>);

impl Times {
    /// A sentence for each phase of which a person takes notice, as a line.
    pub(crate) fn sentences(&self, labels: &[String]) -> String {
        let is_long = |phase: &&PhaseTime| phase.whole() >= NOTICEABLE;
        let phases = self.0.iter().filter(is_long);
        phases.map(|phase| phase.sentence(labels) + "\n").collect()
    }

    /// The last phase alone.
    pub(crate) fn last(&self) -> Self {
        Self(self.0.last().cloned().into_iter().collect())
    }
}

/// Measures the times of a transfer.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    times: Times,
    since: Instant,
    waiting: Waiting,
    /// The shards that have no room, or no data.
    slow: Vec<bool>,
}

impl Clock {
    /// Stands still until the first phase begins.
    pub(crate) fn new(shards: usize) -> Self {
        Self {
            times: Times::default(),
            since: Instant::now(),
            waiting: Waiting::No,
            slow: vec![false; shards],
        }
    }

    /// A phase begins, and the one before ends.
    pub(crate) fn enter(&mut self, phase: Phase) {
        self.count();
        self.times.0.push(PhaseTime {
            phase,
            moving: Duration::ZERO,
            for_shards: Duration::ZERO,
            for_criu: Duration::ZERO,
            shards: vec![Duration::ZERO; self.slow.len()],
        });
    }

    /// From now on this is waited for, and these shards have no room, or no data.
    pub(crate) fn wait(&mut self, waiting: Waiting, slow: impl Iterator<Item = bool>) {
        self.count();
        self.waiting = waiting;
        for (is_slow, now) in self.slow.iter_mut().zip(slow) {
            *is_slow = now;
        }
    }

    fn count(&mut self) {
        let now = Instant::now();
        let passed = now - std::mem::replace(&mut self.since, now);
        let Some(phase) = self.times.0.last_mut() else {
            return;
        };
        *match self.waiting {
            Waiting::No => &mut phase.moving,
            Waiting::ForShards => &mut phase.for_shards,
            Waiting::ForCriu => &mut phase.for_criu,
        } += passed;
        for (time, &is_slow) in phase.shards.iter_mut().zip(&self.slow) {
            if is_slow {
                *time += passed;
            }
        }
    }

    /// The times until now.
    pub(crate) fn times(&self) -> Times {
        let mut until_now = self.clone();
        until_now.count();
        until_now.times
    }
}
