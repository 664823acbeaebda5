//! What a dashboard asks the broker for, and what it has asked for before.
//!
//! Everything that must reach everybody (status, health, alerts, acknowledgements; and studies, which are few) is asked for plainly. In a group
//! (`dashboard.share`) each result goes to one member. Previews are left out there: the broker deals out messages one by one, so a preview
//! would mostly go to another member than its result.
//!
//! The broker keeps the session, and with it every filter that was ever asked for, also after the configuration has changed. So these are kept
//! in a file beside the history, and what is not wanted any more is given up.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use crate::config::Config;
use crate::mqtt::{Gone, Session};

/// File name beside the history: one filter a line.
const FILE: &str = "subscriptions";

/// What goes to every dashboard, and is kept by the broker for one that is away.
const TO_ALL: [&str; 5] = ["status", "health", "alert", "study", "ack/+"];

/// Topic filters of one dashboard.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Subscriptions {
    /// Filters, each with whether the broker is to keep their messages while the dashboard is away.
    wanted: Vec<(String, bool)>,
    /// Asked for in the past, or by a dashboard without a configuration of its own, and not wanted any more.
    former: Vec<String>,
}

impl Subscriptions {
    /// Of `config`. What it has asked for before lies in the dashboard's folder, which is written before anything is asked for.
    pub(super) fn load(config: &Config) -> Self {
        let path = config.dashboard.folder(&config.state).join(FILE);
        let before = match std::fs::read_to_string(&path) {
            Ok(text) => text.lines().map(str::to_owned).collect(),
            Err(_) => BTreeSet::new(),
        };
        let subscriptions = Self::new(config, before.clone());
        let all = subscriptions.all();
        if all != before
            && let Err(error) = write(&path, &all)
        {
            tracing::warn!(
                "dashboard: {} cannot be written ({error}); after a change of dashboard.follow or dashboard.share the broker may send what is not wanted any more",
                path.display()
            );
        }
        subscriptions
    }

    fn new(config: &Config, before: BTreeSet<String>) -> Self {
        let prefix = &config.mqtt.topic_prefix;
        let wanted = filters(prefix, &config.dashboard.follow, &config.dashboard.share);
        let mut former = before;
        // A session from before there was this file.
        former.extend(
            filters(prefix, &[], "")
                .into_iter()
                .map(|(filter, _)| filter),
        );
        former.retain(|filter| !wanted.iter().any(|(wanted, _)| wanted == filter));
        Self {
            wanted,
            former: former.into_iter().collect(),
        }
    }

    fn all(&self) -> BTreeSet<String> {
        let wanted = self.wanted.iter().map(|(filter, _)| filter);
        wanted.chain(&self.former).cloned().collect()
    }

    /// Asks for what is wanted, and then gives up the rest: what comes twice in between is recognised, what nobody listens to is lost.
    pub(super) async fn ask(&self, session: &mut Session) -> Result<(), Gone> {
        for (filter, keep) in &self.wanted {
            session.subscribe(filter, *keep).await?;
        }
        for filter in &self.former {
            session.unsubscribe(filter).await?;
        }
        Ok(())
    }
}

fn filters(prefix: &str, follow: &[String], share: &str) -> Vec<(String, bool)> {
    let everywhere = ["+".to_owned()];
    let follow = if follow.is_empty() {
        &everywhere[..]
    } else {
        follow
    };
    let mut filters = Vec::new();
    for entry in follow {
        let (site, device) = entry.split_once('/').unwrap_or((entry, "+"));
        let base = format!("{prefix}/{site}/{device}");
        filters.extend(TO_ALL.map(|kind| (format!("{base}/{kind}"), true)));
        if share.is_empty() {
            filters.push((format!("{base}/result"), true));
            // A preview that nobody hears is not worth the broker's memory.
            filters.push((format!("{base}/preview"), false));
        } else {
            filters.push((format!("$share/{share}/{base}/result"), true));
        }
    }
    filters
}

fn write(path: &Path, filters: &BTreeSet<String>) -> io::Result<()> {
    let text: String = filters.iter().flat_map(|filter| [filter, "\n"]).collect();
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(follow: &[&str], share: &str) -> Config {
        let mut config = Config::defaults();
        config.dashboard.follow = follow.iter().map(|&entry| entry.to_owned()).collect();
        share.clone_into(&mut config.dashboard.share);
        config
    }

    #[test]
    fn in_a_group_only_results_are_shared() {
        let all = Subscriptions::new(&config(&[], ""), BTreeSet::new());
        assert_eq!(all.wanted.len(), 7);
        assert_eq!(all.former, [""; 0]);
        let shared = Subscriptions::new(&config(&[], "desks"), all.all());
        assert_eq!(
            shared
                .wanted
                .iter()
                .map(|(f, _)| f.as_str())
                .filter(|f| f.starts_with('$'))
                .collect::<Vec<_>>(),
            ["$share/desks/scansentry/+/+/result"]
        );
        assert_eq!(
            shared.former,
            ["scansentry/+/+/preview", "scansentry/+/+/result"]
        );
        let left = Subscriptions::new(&config(&[], ""), shared.all());
        assert_eq!(left.former, ["$share/desks/scansentry/+/+/result"]);
    }

    #[test]
    fn sites_and_appliances_are_asked_for_by_name() {
        let some = Subscriptions::new(&config(&["radiology", "ward/mri-1"], ""), BTreeSet::new());
        let wanted: Vec<_> = some.wanted.iter().map(|(f, _)| f.as_str()).collect();
        for filter in [
            "scansentry/radiology/+/result",
            "scansentry/ward/mri-1/ack/+",
        ] {
            assert!(wanted.contains(&filter), "{wanted:?}");
        }
        assert!(some.former.contains(&"scansentry/+/+/result".to_owned()));
    }

    #[test]
    fn what_was_asked_for_before_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let load = |follow: &[&str]| {
            let mut config = config(follow, "");
            folder.path().clone_into(&mut config.dashboard.dir);
            Subscriptions::load(&config).former
        };
        let everywhere = load(&["radiology"]);
        let back = load(&["ward"]);
        assert_eq!(back.len(), everywhere.len() + 7);
        assert!(back.contains(&"scansentry/radiology/+/status".to_owned()));
        assert!(!load(&["radiology"]).contains(&"scansentry/radiology/+/status".to_owned()));
    }
}
