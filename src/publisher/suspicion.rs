//! Which message may be sent next, and which one is at fault when nothing gets through. No clock, no connection, no ledger.
//!
//! ```text
//!  many ──a connection ended and none had passed, or one was refused──▶ the oldest, alone ◀───────────────┐
//!   ▲                                                                     │         │                     │ it fails, too: the
//!   ├───────────────────────────acknowledged──────────────────────────────┘         │ has failed as often │ broker is at fault
//!   │                                                                               ▼ as is allowed       │
//!   └──acknowledged: the suspect is parked──────────────────── one from behind the suspect, alone ────────┘
//! ```
//!
//! Nothing is parked before another message has been acknowledged in its place, so a broker that takes nothing has nothing parked. Each
//! time another one is tried in the suspect's place it is one from twice as far behind, so that a long row of bad ones is soon passed; beyond the
//! end it begins again right behind the suspect, one farther each time, so that none is left out.

/// Connections that may end over a message alone before it is stepped over.
pub const ENDS: u32 = 3;

/// Refusals that may pass before a message is stepped over.
pub const REFUSALS: u32 = 5;

/// Failures of a message that was parked before, until it is stepped over.
pub const RETURNED: u32 = 1;

/// The farthest that is looked behind a suspect is 2 to this power.
const FARTHEST: u32 = 20;

/// What may be sent next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// As many as fit, in order.
    Many,
    /// The oldest, alone.
    Oldest,
    /// One from behind the suspect, alone.
    Behind {
        /// Position of the suspect.
        suspect: i64,
        /// How many messages behind it are skipped.
        skip: usize,
    },
}

/// A message that is at fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guilty {
    /// Its position in the outbox.
    pub seq: i64,
    /// What it failed of.
    pub reason: String,
}

/// What is known of the messages that do not get through.
#[derive(Debug, Default)]
pub struct Suspicion {
    careful: bool,
    suspect: Option<Suspect>,
}

#[derive(Debug)]
struct Suspect {
    seq: i64,
    reason: String,
    failures: u32,
    /// Others that were tried in its place in this round and failed, too.
    others: u32,
    /// How often the end of the outbox was reached so.
    rounds: usize,
    stepping_over: bool,
}

impl Suspicion {
    /// What may be sent next.
    pub fn next(&self) -> Next {
        match &self.suspect {
            Some(suspect) if suspect.stepping_over => Next::Behind {
                suspect: suspect.seq,
                skip: suspect.rounds + (1 << suspect.others.min(FARTHEST)) - 1,
            },
            Some(_) => Next::Oldest,
            None if self.careful => Next::Oldest,
            None => Next::Many,
        }
    }

    /// Whether a message is under suspicion.
    pub fn has_suspect(&self) -> bool {
        self.suspect.is_some()
    }

    /// A connection ended with several messages on their way, and none had passed.
    pub fn none_passed(&mut self) {
        self.careful = true;
    }

    /// A message was refused, or a connection ended over it; it may fail `allowed` times before it is stepped over.
    pub fn failed(&mut self, seq: i64, allowed: u32, reason: String) {
        self.careful = true;
        let suspect = match &mut self.suspect {
            Some(suspect) if suspect.seq < seq => {
                // One that was tried in its place, or one of those that were on their way with it.
                suspect.others += u32::from(suspect.stepping_over);
                suspect.stepping_over = false;
                return;
            }
            Some(suspect) if suspect.seq == seq => suspect,
            // Another one has become the oldest.
            other => other.insert(Suspect {
                seq,
                reason: String::new(),
                failures: 0,
                others: 0,
                rounds: 0,
                stepping_over: false,
            }),
        };
        suspect.failures += 1;
        suspect.reason = reason;
        suspect.stepping_over = suspect.failures >= allowed;
    }

    /// A message was acknowledged. The suspect is guilty if this one was tried in its place.
    pub fn acknowledged(&mut self, seq: i64) -> Option<Guilty> {
        let guilty = match &self.suspect {
            Some(suspect) if suspect.seq == seq => None,
            Some(suspect) if suspect.stepping_over => Some(Guilty {
                seq: suspect.seq,
                reason: suspect.reason.clone(),
            }),
            Some(_) => return None,
            None => None,
        };
        *self = Self::default();
        guilty
    }

    /// A message has left the outbox in another way.
    pub fn gone(&mut self, seq: i64) {
        self.suspect.take_if(|suspect| suspect.seq == seq);
    }

    /// There is no message where [`Next::Behind`] looked. Whether to look again, nearer to the suspect.
    pub fn nothing_there(&mut self) -> bool {
        let Some(suspect) = &mut self.suspect else {
            return true;
        };
        if std::mem::take(&mut suspect.others) > 0 {
            suspect.rounds += 1;
            true
        } else {
            std::mem::take(&mut suspect.rounds) > 0
        }
    }

    /// The suspect is tried once more, because nothing came that could be tried in its place.
    pub fn back_to_suspect(&mut self) {
        if let Some(suspect) = &mut self.suspect {
            suspect.stepping_over = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a broker makes of a message, each time alike.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fate {
        Taken,
        Refused,
        EndsTheConnection,
    }

    /// A publisher with its outbox and a broker; positions count from 0.
    struct World {
        fates: Vec<Fate>,
        waiting: Vec<i64>,
        taken: Vec<i64>,
        parked: Vec<i64>,
        suspicion: Suspicion,
    }

    impl World {
        fn new(fates: Vec<Fate>) -> Self {
            Self {
                waiting: (0..fates.len() as i64).collect(),
                fates,
                taken: Vec::new(),
                parked: Vec::new(),
                suspicion: Suspicion::default(),
            }
        }

        fn good_ones_wait(&self) -> bool {
            let good = |seq: &i64| self.fates[*seq as usize] == Fate::Taken;
            self.waiting.iter().any(good)
        }

        /// Sends what may be sent and tells what became of it. False: nothing may be sent.
        fn turn(&mut self, window: usize) -> bool {
            let batch: Vec<i64> = match self.suspicion.next() {
                Next::Many => self.waiting.iter().take(window).copied().collect(),
                Next::Oldest => self.waiting.iter().take(1).copied().collect(),
                Next::Behind { suspect, skip } => {
                    let behind = self.waiting.iter().filter(|seq| **seq > suspect);
                    let found: Vec<_> = behind.skip(skip).take(1).copied().collect();
                    if found.is_empty() {
                        return self.suspicion.nothing_there();
                    }
                    found
                }
            };
            let mut passed = false;
            for (place, seq) in batch.iter().enumerate() {
                let seq = *seq;
                match self.fates[seq as usize] {
                    Fate::Taken => {
                        passed = true;
                        self.waiting.retain(|other| *other != seq);
                        self.taken.push(seq);
                        if let Some(guilty) = self.suspicion.acknowledged(seq) {
                            self.waiting.retain(|other| *other != guilty.seq);
                            self.parked.push(guilty.seq);
                        }
                    }
                    Fate::Refused => self.suspicion.failed(seq, REFUSALS, "refused".into()),
                    Fate::EndsTheConnection => {
                        if place + 1 == batch.len() {
                            self.suspicion.failed(seq, ENDS, "ended".into());
                        } else if !passed {
                            self.suspicion.none_passed();
                        }
                        break;
                    }
                }
            }
            true
        }
    }

    fn fates() -> impl Strategy<Value = Vec<Fate>> {
        let fate = prop_oneof![
            4 => Just(Fate::Taken),
            1 => Just(Fate::Refused),
            1 => Just(Fate::EndsTheConnection),
        ];
        prop::collection::vec(fate, 1..40)
    }

    proptest! {
        #[test]
        fn every_good_message_passes_once_and_only_bad_ones_are_parked(fates in fates(), window in 1usize..10) {
            let mut world = World::new(fates);
            for _ in 0..4000 {
                if !world.good_ones_wait() {
                    break;
                }
                world.turn(window);
            }
            prop_assert!(!world.good_ones_wait(), "good ones are stuck: {:?}", world.waiting);
            for seq in &world.parked {
                prop_assert!(world.fates[*seq as usize] != Fate::Taken);
            }
            let mut taken = world.taken.clone();
            taken.sort_unstable();
            taken.dedup();
            prop_assert_eq!(taken.len(), world.taken.len());
        }

        #[test]
        fn a_broker_that_takes_nothing_has_nothing_parked(
            bad in prop::collection::vec(prop_oneof![Just(Fate::Refused), Just(Fate::EndsTheConnection)], 1..20),
            window in 1usize..10,
        ) {
            let mut world = World::new(bad);
            for _ in 0..300 {
                if !world.turn(window) {
                    world.suspicion.back_to_suspect();
                }
            }
            prop_assert!(world.parked.is_empty());
            // Mended, it gets all of them.
            world.fates.fill(Fate::Taken);
            for _ in 0..300 {
                if !world.turn(window) {
                    world.suspicion.back_to_suspect();
                }
            }
            let parked_and_taken = world.parked.len() + world.taken.len();
            prop_assert_eq!(parked_and_taken, world.fates.len());
            prop_assert!(world.parked.len() <= 1, "only the suspect of that moment can be wronged");
        }

        #[test]
        fn good_messages_keep_their_order_but_for_one_at_a_time(fates in fates(), window in 1usize..10) {
            let mut world = World::new(fates);
            for _ in 0..4000 {
                world.turn(window);
            }
            // What was on its way with a refused message, or was tried in its place, goes ahead of what waits; nothing else does.
            let bad = world.fates.iter().filter(|fate| **fate != Fate::Taken).count();
            let early = world.taken.windows(2).filter(|pair| pair[0] > pair[1]).count();
            prop_assert!(early <= bad, "{early} steps back with {bad} bad messages");
        }
    }

    #[test]
    fn a_message_that_ends_connections_is_parked_after_three_and_one_in_its_place() {
        let mut suspicion = Suspicion::default();
        assert_eq!(suspicion.next(), Next::Many);
        suspicion.none_passed();
        for _ in 0..ENDS {
            assert_eq!(suspicion.next(), Next::Oldest);
            suspicion.failed(7, ENDS, "closed".into());
        }
        let behind = |skip| Next::Behind { suspect: 7, skip };
        assert_eq!(suspicion.next(), behind(0));
        suspicion.failed(8, ENDS, "closed".into());
        assert_eq!(suspicion.next(), Next::Oldest, "the broker may be at fault");
        suspicion.failed(7, ENDS, "closed".into());
        assert_eq!(suspicion.next(), behind(1));
        let guilty = suspicion.acknowledged(9).unwrap();
        assert_eq!((guilty.seq, &guilty.reason[..]), (7, "closed"));
        assert_eq!(suspicion.next(), Next::Many);
    }

    #[test]
    fn acknowledgements_of_what_was_on_its_way_prove_nothing() {
        let mut suspicion = Suspicion::default();
        suspicion.failed(3, REFUSALS, "quota".into());
        assert_eq!(suspicion.acknowledged(4), None);
        assert_eq!(suspicion.next(), Next::Oldest);
        assert_eq!(suspicion.acknowledged(3), None);
        assert_eq!(suspicion.next(), Next::Many);
    }
}
