//! A quota's definition: as JSON, on the command line, and in a line of text.

use std::time::Duration;

use serde::de::value::{Error as NotKnown, StrDeserializer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tollgate::{Overrun, Quota, QuotaId, Window};

/// How a quota is written on the command line.
pub(crate) const FLAG_FORM: &str = "NAME=LIMIT/WINDOW";

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

/// For a line that has its name.
pub(crate) fn summary(quota: &Quota) -> String {
    format!("limit {}, window {}", quota.limit(), quota.counting_window())
}

/// Reads a quota of the command line, with a window by the name that it has in JSON.
pub(crate) fn parse(text: &str) -> Result<Quota, String> {
    let read = || {
        // Only the name may hold these characters too.
        let (name, usage) = text.rsplit_once('=')?;
        let (limit, window) = usage.split_once('/')?;
        let window = WindowName::deserialize(StrDeserializer::<NotKnown>::new(window)).ok()?;
        Some(Quota::new(name, limit.parse().ok()?).window(window.into()))
    };
    let quota = read().ok_or_else(|| {
        format!(
            "expected {FLAG_FORM}, as in requests=1000/day; windows are lifetime, minute, hour, \
             day, month and year"
        )
    })?;
    quota.validate().map_err(|error| error.to_string())?;
    Ok(quota)
}

fn window_json(window: Window) -> Value {
    match window {
        Window::Every(length) => json!({ "every_ms": length.as_millis() }),
        named => json!(named.to_string()),
    }
}

/// What happens where a reservation cost more than was reserved.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum OverrunName {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_of_the_command_line_is_read() {
        let day = |name: &str| Quota::new(name, 1_000).window(Window::Day);
        for name in ["requests", "a=b", "per day/user", "größe"] {
            assert_eq!(parse(&format!("{name}=1000/day")), Ok(day(name)));
        }
        let windows = ["lifetime", "minute", "hour", "day", "month", "year"];
        for window in windows {
            let text = parse(&format!("q=7/{window}")).map(|quota| summary(&quota));
            assert_eq!(text, Ok(format!("limit 7, window {window}")));
        }
    }

    #[test]
    fn what_is_no_quota_is_told_the_form() {
        for text in [
            "",
            "requests",
            "requests=1000",
            "q=/day",
            "q=1/",
            "q=-1/day",
            "q=1/Day",
            "q=1/every_ms",
        ] {
            let told = parse(text).expect_err(text);
            assert!(told.contains(FLAG_FORM) && told.contains("requests=1000/day"), "{told}");
        }
        for text in ["=1/day", "q=9223372036854775808/day"] {
            let told = parse(text).expect_err(text);
            assert!(told.contains("can't be defined"), "{told}");
        }
    }
}
