//! Days and dates of the proleptic Gregorian calendar.
//!
//! Howard Hinnant's algorithms, `days_from_civil` and `civil_from_days`, from
//! <https://howardhinnant.github.io/date_algorithms.html>: exact, without loops or tables. Years
//! are counted from March within eras of 400 years, so that the leap day comes last.

const DAYS_PER_ERA: i64 = 146_097;
/// From 0000-03-01, where era 0 begins, to 1970-01-01.
const DAYS_TO_1970: i64 = 719_468;

/// A calendar date.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Date {
    pub(super) year: i64,
    /// 1..=12.
    pub(super) month: i64,
    /// 1..=31.
    pub(super) day: i64,
}

impl Date {
    /// The date of a day counted from 1970-01-01.
    pub(super) fn from_days(days: i64) -> Self {
        let days = days + DAYS_TO_1970;
        let era = days.div_euclid(DAYS_PER_ERA);
        let day_of_era = days.rem_euclid(DAYS_PER_ERA);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self { year, month, day }
    }

    /// The days from 1970-01-01 to this date.
    pub(super) fn to_days(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let month_from_march = (self.month + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        era * DAYS_PER_ERA + day_of_era - DAYS_TO_1970
    }

    /// The first day of this date's month.
    pub(super) fn month_start(self) -> Self {
        Self { day: 1, ..self }
    }

    /// The first day of the month after this date's.
    pub(super) fn next_month_start(self) -> Self {
        match self.month {
            12 => self.next_year_start(),
            month => Self { month: month + 1, day: 1, ..self },
        }
    }

    /// The first day of this date's year.
    pub(super) fn year_start(self) -> Self {
        Self { month: 1, day: 1, ..self }
    }

    /// The first day of the year after this date's.
    pub(super) fn next_year_start(self) -> Self {
        Self { year: self.year + 1, month: 1, day: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn days_in_month(year: i64, month: i64) -> i64 {
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        match month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        }
    }

    /// Walks every day of the years 1600 to 10000 by the rules that children learn.
    #[test]
    fn every_day_agrees_with_a_walk_through_the_calendar() {
        let mut date = Date { year: 1600, month: 1, day: 1 };
        let mut days = -135_140;
        while date.year <= 10_000 {
            assert_eq!(Date::from_days(days), date, "day {days}");
            assert_eq!(date.to_days(), days, "{date:?}");
            days += 1;
            date = if date.day < days_in_month(date.year, date.month) {
                Date { day: date.day + 1, ..date }
            } else {
                date.next_month_start()
            };
        }
    }
}
