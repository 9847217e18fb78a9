//! A quota's definition as JSON.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tollgate::{Overrun, Quota, QuotaId, Window};

pub(crate) fn describe(id: QuotaId, quota: &Quota) -> Value {
    json!({
        "id": id.as_u16(),
        "name": quota.name(),
        "limit": quota.limit(),
        "window": window_json(quota.counting_window()),
        "utc_offset_minutes": quota.offset_minutes(),
        "decimals": quota.decimal_places(),
        "overrun": OverrunName::from(quota.overrun_policy()),
    })
}

fn window_json(window: Window) -> Value {
    match window {
        Window::Every(length) => json!({ "every_ms": length.as_millis() }),
        named => json!(named.to_string()),
    }
}

/// What happens where a reservation cost more than was reserved.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OverrunName {
    #[default]
    Charge,
    Refuse,
}

impl From<OverrunName> for Overrun {
    fn from(name: OverrunName) -> Self {
        match name {
            OverrunName::Charge => Self::Charge,
            OverrunName::Refuse => Self::Refuse,
        }
    }
}

impl From<Overrun> for OverrunName {
    fn from(overrun: Overrun) -> Self {
        match overrun {
            Overrun::Refuse => Self::Refuse,
            _ => Self::Charge,
        }
    }
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WindowName {
    #[default]
    Lifetime,
    Minute,
    Hour,
    Day,
    Month,
    Year,
    EveryMs(u64),
}

impl From<WindowName> for Window {
    fn from(name: WindowName) -> Self {
        match name {
            WindowName::Lifetime => Self::Lifetime,
            WindowName::Minute => Self::Minute,
            WindowName::Hour => Self::Hour,
            WindowName::Day => Self::Day,
            WindowName::Month => Self::Month,
            WindowName::Year => Self::Year,
            WindowName::EveryMs(ms) => Self::Every(Duration::from_millis(ms)),
        }
    }
}
