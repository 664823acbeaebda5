//! Answers to what the page asks.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot, watch};

use super::{Broker, Order};
use crate::history::{ApplianceKey, Question};
use crate::http::{Answer, Page, Part, Refusal, Update};
use crate::message::{NOTICE, rfc3339};
use crate::scan::Pseudonym;
use crate::store::{HistoryReader, StoreError};

use super::upload::Inbox;

/// Alerts that need attention, at most; how many there are is said.
const ALERTS: usize = 50;

pub(super) struct Answers {
    pub(super) reader: HistoryReader,
    pub(super) updates: broadcast::Sender<Arc<Update>>,
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) broker: watch::Receiver<Broker>,
    pub(super) name: String,
    /// `dashboard.share`.
    pub(super) share: String,
    /// `dashboard.follow`.
    pub(super) follow: Vec<String>,
    pub(super) inbox: Option<Arc<Inbox>>,
}

/// The broker's state as the page gets it.
pub(super) fn broker_json(broker: &Broker) -> Value {
    let since = jiff::Timestamp::from_millisecond(broker.since_ms).map(rfc3339);
    json!({
        "now": rfc3339(jiff::Timestamp::now()),
        "broker": { "connected": broker.connected, "since": since.ok(), "reason": broker.reason },
        "storage": broker.storage,
    })
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Away(format!("history: cannot be read now ({error}); try again"))
    }
}

/// Reads that may hold a thread each; the process has few of them, and the main job needs some.
static READS: Semaphore = Semaphore::const_new(2);

/// Reads in a thread that may wait.
pub(super) async fn read<T: Send + 'static>(
    reader: HistoryReader,
    call: impl FnOnce(&HistoryReader) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let place = READS.acquire().await;
    let read = move || {
        let _place = place;
        call(&reader)
    };
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|_| {
        Err(Refusal::Away(
            "history: a defect in the program; see the log".into(),
        ))
    })
}

fn answer(reader: &HistoryReader, question: Question) -> Result<Value, Refusal> {
    Ok(match question {
        Question::State => {
            let (alerts, open) = reader.open_alerts(ALERTS)?;
            json!({ "appliances": reader.appliances(None)?, "alerts": alerts, "open_alerts": open })
        }
        Question::Results(filter) => {
            let rows = reader.results(&filter)?;
            let more = rows.len() == filter.limit;
            json!({ "rows": rows, "more": more })
        }
        Question::Alerts { before_ms, limit } => {
            let alerts = reader.closed_alerts(before_ms, limit)?;
            let more = alerts.len() == limit;
            json!({ "alerts": alerts, "more": more })
        }
        Question::Study(appliance, id) => reader.study(&appliance, id)?.ok_or(Refusal::NotFound)?,
        Question::Scan(appliance, id) => match reader.scan(&appliance, id)? {
            frames if frames.is_empty() => return Err(Refusal::NotFound),
            frames => json!({ "frames": frames }),
        },
        Question::Charts {
            appliance,
            from_ms,
            to_ms,
        } => reader.charts(appliance.as_ref(), from_ms, to_ms)?,
    })
}

impl Page for Answers {
    fn answer(&self, question: Question) -> Answer<String> {
        let reader = self.reader.clone();
        let about_me = (question == Question::State).then(|| {
            let mut about = broker_json(&self.broker.borrow());
            about["name"] = self.name.as_str().into();
            about["share"] = (!self.share.is_empty()).then_some(&*self.share).into();
            about["follow"] = self.follow.clone().into();
            about["version"] = env!("CARGO_PKG_VERSION").into();
            about["notice"] = NOTICE.into();
            about["upload"] = match &self.inbox {
                Some(inbox) => json!({
                    "bytes": inbox.file_bytes,
                    "site": inbox.appliance.site,
                    "device": inbox.appliance.device,
                }),
                None => Value::Null,
            };
            about
        });
        Box::pin(async move {
            let mut found = read(reader, |reader| answer(reader, question)).await?;
            if let (Some(Value::Object(about)), Value::Object(found)) = (about_me, &mut found) {
                found.extend(about);
            }
            Ok(found.to_string())
        })
    }

    fn picture(
        &self,
        appliance: ApplianceKey,
        scan: Pseudonym,
        frame: Option<u32>,
    ) -> Answer<Vec<u8>> {
        let reader = self.reader.clone();
        Box::pin(read(reader, move |reader| {
            reader
                .preview(&appliance, scan, frame)?
                .ok_or(Refusal::NotFound)
        }))
    }

    fn acknowledge(
        &self,
        appliance: ApplianceKey,
        alert: Pseudonym,
        take_back: bool,
    ) -> Answer<String> {
        let (reader, orders) = (self.reader.clone(), self.orders.clone());
        Box::pin(async move {
            let key = appliance.clone();
            let known = read(reader, move |reader| Ok(reader.alert(&key, alert)?)).await?;
            if known.is_none() {
                return Err(Refusal::NotFound);
            }
            let (done, answer) = oneshot::channel();
            let order = Order {
                appliance,
                alert,
                take_back,
                done,
            };
            let late = || {
                Refusal::Away(
                    "broker: did not confirm the acknowledgement in time; try again".into(),
                )
            };
            orders.try_send(order).map_err(|_| {
                Refusal::Busy("acknowledgement: too many at once; try again".into())
            })?;
            answer.await.unwrap_or_else(|_| Err(late()))?;
            Ok("{}".into())
        })
    }

    fn upload(&self, extension: Option<String>, parts: mpsc::Receiver<Part>) -> Answer<String> {
        let Some(inbox) = self.inbox.clone() else {
            return Box::pin(async { Err(Refusal::Forbidden("upload: is off here")) });
        };
        let reader = self.reader.clone();
        Box::pin(inbox.take(extension, parts, reader))
    }

    fn upload_limit(&self) -> Option<u64> {
        self.inbox.as_ref().map(|inbox| inbox.file_bytes)
    }

    fn updates(&self) -> broadcast::Receiver<Arc<Update>> {
        self.updates.subscribe()
    }
}
