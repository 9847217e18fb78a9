//! Quotas, as callers describe them.

use super::amount::{DECIMALS_MAX, f64_from_units, units_from_f64};
use super::window::Calendar;
use super::{AMOUNT_MAX, Window};
use crate::error::{Error, Result};

/// The longest name, in bytes.
const NAME_BYTES_MAX: usize = 128;

/// What users may use: a name, a limit per user, and the window after which usage starts from zero.
///
/// Nothing is checked until the quota is defined or [`validate`](Self::validate) is called; a value
/// out of its bounds is [`Error::InvalidQuota`] then.
///
/// ```
/// use tollgate::{Quota, Window};
///
/// // 99.99 credits a day, counted in hundredths, days beginning at midnight in Berlin's winter.
/// let credits =
///     Quota::new("credits", 9_999).window(Window::Day).utc_offset_minutes(60).decimals(2);
/// assert_eq!(credits.units(0.29)?, 29);
/// assert_eq!(credits.value(9_999), 99.99);
/// # Ok::<(), tollgate::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[must_use = "a quota has no effect until it is defined"]
pub struct Quota {
    pub(crate) name: String,
    pub(crate) limit: u64,
    pub(crate) window: Window,
    pub(crate) utc_offset_minutes: i16,
    pub(crate) decimals: u8,
    pub(crate) overrun: Overrun,
}

/// What happens to a commit that exceeds its reservation and does not fit the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
#[non_exhaustive]
pub enum Overrun {
    /// It is charged, past the limit if need be: the cost has been incurred.
    #[default]
    Charge,
    /// It is refused, and the reservation stays open. So is any overrun in a window that has ended,
    /// since what would have fitted there is mostly no longer known.
    Refuse,
}

impl Quota {
    /// A quota of `limit` units for each user, for a lifetime unless [`window`](Self::window) says
    /// otherwise.
    ///
    /// The name identifies the quota in its data directory: 1 to 128 bytes, without control
    /// characters. The limit is at most [`AMOUNT_MAX`]; 0 denies everything to users who have no
    /// limit of their own.
    pub fn new(name: impl Into<String>, limit: u64) -> Self {
        Self {
            name: name.into(),
            limit,
            window: Window::Lifetime,
            utc_offset_minutes: 0,
            decimals: 0,
            overrun: Overrun::Charge,
        }
    }

    /// Sets another limit. To change the limit of a defined quota, `define` the result.
    ///
    /// ```
    /// # use tollgate::{Config, Quota, Tollgate};
    /// # let dir = tempfile::tempdir()?;
    /// # let gate = Tollgate::open(dir.path(), Config::default())?;
    /// # let requests = gate.define(Quota::new("requests", 1_000))?;
    /// let raised = gate.quota(requests)?.with_limit(2_000);
    /// assert_eq!(gate.define(raised)?, requests);
    /// assert_eq!(gate.usage(42, requests)?.limit, 2_000);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_limit(mut self, limit: u64) -> Self {
        self.limit = limit;
        self
    }

    /// Sets the period after which usage starts from zero. Default: [`Window::Lifetime`], never.
    pub fn window(mut self, window: Window) -> Self {
        self.window = window;
        self
    }

    /// Sets the UTC offset of the local time that windows follow, in minutes: -840 to 840 (14
    /// hours), positive to the east. Default: 0.
    pub fn utc_offset_minutes(mut self, minutes: i16) -> Self {
        self.utc_offset_minutes = minutes;
        self
    }

    /// Sets how many decimals of a floating-point amount are counted, 0 to 18: one unit is
    /// 10^-`decimals`. Default: 0. All integer amounts, including the limit, are in units.
    pub fn decimals(mut self, decimals: u8) -> Self {
        self.decimals = decimals;
        self
    }

    /// Sets what happens to a commit of more than was reserved. Default: [`Overrun::Charge`].
    pub fn overrun(mut self, overrun: Overrun) -> Self {
        self.overrun = overrun;
        self
    }

    /// The name that identifies the quota.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The limit of users who have none of their own, in units.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// What [`window`](Self::window) set.
    #[must_use]
    pub fn counting_window(&self) -> Window {
        self.window
    }

    /// What [`utc_offset_minutes`](Self::utc_offset_minutes) set.
    #[must_use]
    pub fn offset_minutes(&self) -> i16 {
        self.utc_offset_minutes
    }

    /// What [`overrun`](Self::overrun) set.
    #[must_use]
    pub fn overrun_policy(&self) -> Overrun {
        self.overrun
    }

    /// What [`decimals`](Self::decimals) set.
    #[must_use]
    pub fn decimal_places(&self) -> u8 {
        self.decimals
    }

    /// Converts a floating-point amount to the nearest number of units, ties to the even one. 0.0
    /// gives 0, which is not an amount that can be consumed.
    ///
    /// The value is taken exactly as it is stored, and rounded once: 0.285 is stored as slightly
    /// less, so it gives 28 units with two decimals.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidFloat`] for a value that is not a number, infinite, negative, more than
    /// [`AMOUNT_MAX`] units, or positive but less than half a unit (or exactly half of one, which
    /// rounds to 0); and when the quota has more than 18 decimals.
    pub fn units(&self, value: f64) -> Result<u64> {
        units_from_f64(value, self.decimals)
    }

    /// Converts a number of units to floating point: to the nearest number below 2^53 units, and
    /// from there on to within two units in the last place. [`units`](Self::units) turns the result
    /// into the same number of units, up to 2^52.
    #[must_use]
    pub fn value(&self, units: u64) -> f64 {
        f64_from_units(units, self.decimals)
    }

    /// Checks all bounds, as [`Tollgate::define`](crate::Tollgate::define) does.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidQuota`].
    pub fn validate(&self) -> Result<()> {
        self.calendar().map(drop)
    }

    /// Checks all bounds, and returns the windows of the quota.
    pub(crate) fn calendar(&self) -> Result<Calendar> {
        self.checked_calendar()
            .map_err(|reason| Error::InvalidQuota { name: self.name.clone(), reason })
    }

    fn checked_calendar(&self) -> Result<Calendar, String> {
        check_name(&self.name)?;
        if self.limit > AMOUNT_MAX {
            return Err(format!("its limit is {}, allowed: 0..={AMOUNT_MAX}", self.limit));
        }
        if self.decimals > DECIMALS_MAX {
            return Err(format!("it has {} decimals, allowed: 0..={DECIMALS_MAX}", self.decimals));
        }
        Calendar::new(self.window, self.utc_offset_minutes)
    }
}

fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(format!(
            "its name is {} bytes long, allowed: 1..={NAME_BYTES_MAX}",
            name.len()
        ));
    }
    match name.char_indices().find(|(_, char)| char.is_control()) {
        Some((at, char)) => {
            Err(format!("its name has a control character, {char:?}, at byte {at}"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::window::{EVERY_MAX, EVERY_MIN, UTC_OFFSET_MINUTES_MAX};
    use super::*;

    fn quota() -> Quota {
        Quota::new("requests", 10)
    }

    fn reason(quota: &Quota) -> String {
        match quota.validate() {
            Err(Error::InvalidQuota { name, reason }) => {
                assert_eq!(name, quota.name());
                reason
            }
            other => panic!("{quota:?} was accepted: {other:?}"),
        }
    }

    #[test]
    fn each_bound_is_allowed() {
        for quota in [
            Quota::new("x", 0),
            Quota::new("x".repeat(NAME_BYTES_MAX), AMOUNT_MAX),
            Quota::new("Größe/プラン: a b", 1),
            quota().decimals(DECIMALS_MAX),
            quota().utc_offset_minutes(UTC_OFFSET_MINUTES_MAX),
            quota().utc_offset_minutes(-UTC_OFFSET_MINUTES_MAX),
            quota().window(Window::Every(EVERY_MIN)),
            quota().window(Window::Every(EVERY_MAX)),
        ] {
            assert!(quota.validate().is_ok(), "{quota:?}");
        }
    }

    #[test]
    fn beyond_each_bound_the_reason_names_value_and_bound() {
        assert_eq!(reason(&Quota::new("", 1)), "its name is 0 bytes long, allowed: 1..=128");
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        assert_eq!(reason(&Quota::new(long, 1)), "its name is 129 bytes long, allowed: 1..=128");
        assert_eq!(
            reason(&Quota::new("a\nb", 1)),
            "its name has a control character, '\\n', at byte 1"
        );
        assert_eq!(
            reason(&Quota::new("a", AMOUNT_MAX + 1)),
            "its limit is 9223372036854775808, allowed: 0..=9223372036854775807"
        );
        assert_eq!(reason(&quota().decimals(19)), "it has 19 decimals, allowed: 0..=18");
        assert_eq!(
            reason(&quota().utc_offset_minutes(-841)),
            "its UTC offset is -841 minutes, allowed: -840..=840"
        );
        assert!(reason(&quota().utc_offset_minutes(i16::MIN)).contains("-32768 minutes"));
        let every = |length| reason(&quota().window(Window::Every(length)));
        assert_eq!(every(Duration::ZERO), "its window is 0ns long, allowed: 1s..=3155760000s");
        assert!(every(EVERY_MIN - Duration::from_nanos(1)).contains("allowed"));
        assert!(every(EVERY_MAX + Duration::from_nanos(1)).contains("allowed"));
        assert_eq!(
            every(Duration::from_micros(1_500_500)),
            "its window is 1.5005s long, not whole milliseconds"
        );
    }
}
