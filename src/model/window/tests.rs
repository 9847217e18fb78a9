//! That spans hold the time they were asked for, tile time, and start where a calendar on the wall
//! says.

use proptest::prelude::*;

use super::*;

fn calendar(window: Window, utc_offset_minutes: i16) -> Calendar {
    Calendar::new(window, utc_offset_minutes).unwrap()
}

fn at(millis: u64) -> Timestamp {
    Timestamp::from_unix_millis(millis)
}

fn holds(span: Span, at: Timestamp) -> bool {
    span.start.0 <= at.as_unix_millis() && span.end.is_none_or(|end| at < end)
}

/// Start and end of the span around a time, as text.
fn printed(calendar: Calendar, millis: u64) -> (String, String) {
    let span = calendar.span_at(at(millis));
    let end = span.end.map_or("never".to_owned(), |end| end.to_string());
    (at(span.start.0).to_string(), end)
}

/// Walks from span to span up to `last`: each begins where the one before ended, and its first and
/// last millisecond belong to it. Returns how many there are.
fn walk(calendar: Calendar, first: Timestamp, last: Timestamp) -> u64 {
    let mut count = 1;
    let mut span = calendar.span_at(first);
    assert!(holds(span, first));
    while let Some(end) = span.end.filter(|&end| end <= last) {
        let last_of_span = at(end.as_unix_millis() - 1);
        assert_eq!(calendar.span_at(last_of_span), span, "{calendar:?} just before {end}");
        assert_eq!(calendar.end_of(span.start), span.end, "{calendar:?} at {end}");
        let next = calendar.span_at(end);
        assert_eq!(next.start.0, end.as_unix_millis(), "{calendar:?} at {end}");
        assert!(next.start > span.start);
        span = next;
        count += 1;
    }
    count
}

const OFFSETS: [i16; 7] = [-840, -570, -1, 0, 1, 345, 840];

#[test]
fn every_month_and_year_up_to_9999_tiles_time() {
    for offset in OFFSETS {
        // West of Greenwich 1970 begins in local 1969, east of it ends early: one more period.
        let more = u64::from(offset != 0);
        let years = walk(calendar(Window::Year, offset), Timestamp::MIN, Timestamp::MAX);
        assert_eq!(years, 8030 + more);
        let months = walk(calendar(Window::Month, offset), Timestamp::MIN, Timestamp::MAX);
        assert_eq!(months, 8030 * 12 + more);
    }
}

#[test]
fn every_day_up_to_9999_tiles_time() {
    for offset in [-570, 0, 345] {
        let days = walk(calendar(Window::Day, offset), Timestamp::MIN, Timestamp::MAX);
        assert_eq!(days, 2_932_897 + u64::from(offset != 0));
    }
}

#[test]
fn minutes_and_hours_tile_the_days_around_a_leap_day() {
    let (first, last) = (at(1_709_078_400_000), at(1_709_337_600_000));
    for offset in OFFSETS {
        assert_eq!(walk(calendar(Window::Minute, offset), first, last), 3 * 24 * 60 + 1);
        let hours = walk(calendar(Window::Hour, offset), first, last);
        assert_eq!(hours, 3 * 24 + 1, "{offset}");
    }
}

#[test]
fn spans_are_those_of_local_time() {
    // 2024-02-29T20:30:00Z: already March 1 in India.
    let leap_day = 1_709_238_600_000;
    let span = |window, offset| printed(calendar(window, offset), leap_day);
    let text = |start: &str, end: &str| (start.to_owned(), end.to_owned());
    let minute = text("2024-02-29T20:30:00.000Z", "2024-02-29T20:31:00.000Z");
    assert_eq!(span(Window::Minute, 0), minute);
    let half_hour_off = text("2024-02-29T20:30:00.000Z", "2024-02-29T21:30:00.000Z");
    assert_eq!(span(Window::Hour, 330), half_hour_off);
    let day = text("2024-02-29T18:30:00.000Z", "2024-03-01T18:30:00.000Z");
    assert_eq!(span(Window::Day, 330), day);
    let february = text("2024-02-01T00:00:00.000Z", "2024-03-01T00:00:00.000Z");
    assert_eq!(span(Window::Month, 0), february);
    let march = text("2024-02-29T18:30:00.000Z", "2024-03-31T18:30:00.000Z");
    assert_eq!(span(Window::Month, 330), march);
    let year = text("2024-01-01T05:00:00.000Z", "2025-01-01T05:00:00.000Z");
    assert_eq!(span(Window::Year, -300), year);
    let week = Window::Every(Duration::from_hours(7 * 24));
    let from_thursday = text("2024-02-29T00:00:00.000Z", "2024-03-07T00:00:00.000Z");
    assert_eq!(span(week, 0), from_thursday);
    assert_eq!(span(Window::Lifetime, 0), text("1970-01-01T00:00:00.000Z", "never"));
}

#[test]
fn the_first_and_the_last_window_are_cut_off() {
    let day = calendar(Window::Day, 60);
    let first = Span { start: WindowStart(0), end: Some(at(23 * 3_600_000)) };
    assert_eq!(day.span_at(Timestamp::MIN), first);
    assert_eq!(day.end_of(WindowStart(0)), first.end);
    for window in [Window::Year, Window::Minute, Window::Every(EVERY_MAX)] {
        let last = calendar(window, 0).span_at(Timestamp::MAX);
        assert_eq!(last.end, None, "{window:?}");
        assert!(last.start <= WindowStart::MAX);
    }
    // East of Greenwich the local year 10000 begins while it is still 9999 in UTC.
    let year_10000 = calendar(Window::Year, 840).span_at(Timestamp::MAX);
    assert_eq!(at(year_10000.start.0).to_string(), "9999-12-31T10:00:00.000Z");
}

/// 55,757 ms divide the largest timestamp, so that a period begins with it.
#[test]
fn the_last_timestamp_can_be_an_end_and_a_start() {
    let calendar = calendar(Window::Every(Duration::from_millis(55_757)), 0);
    let last = Timestamp::MAX.as_unix_millis();
    assert_eq!(calendar.span_at(at(last - 1)).end, Some(Timestamp::MAX));
    assert_eq!(calendar.span_at(at(last)), Span { start: WindowStart(last), end: None });
}

fn any_calendar() -> impl Strategy<Value = Calendar> {
    let every = (EVERY_MIN.as_secs() * 1000..=EVERY_MAX.as_secs() * 1000)
        .prop_map(|millis| Window::Every(Duration::from_millis(millis)));
    let short =
        (1000_u64..100_000_000).prop_map(|millis| Window::Every(Duration::from_millis(millis)));
    let window = prop_oneof![
        Just(Window::Lifetime),
        Just(Window::Minute),
        Just(Window::Hour),
        Just(Window::Day),
        Just(Window::Month),
        Just(Window::Year),
        every,
        short,
    ];
    let offset = -UTC_OFFSET_MINUTES_MAX..=UTC_OFFSET_MINUTES_MAX;
    (window, offset).prop_map(|(window, offset)| calendar(window, offset))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_span_holds_its_time_and_meets_the_next(
        calendar in any_calendar(), millis in 0..=Timestamp::MAX.as_unix_millis(),
    ) {
        let span = calendar.span_at(at(millis));
        prop_assert!(holds(span, at(millis)));
        prop_assert!(span.start <= WindowStart::MAX);
        prop_assert_eq!(calendar.span_at(at(span.start.0)), span);
        prop_assert_eq!(calendar.end_of(span.start), span.end);
        if let Some(end) = span.end {
            prop_assert_eq!(calendar.span_at(at(end.as_unix_millis() - 1)), span);
            prop_assert_eq!(calendar.span_at(end).start.0, end.as_unix_millis());
        }
    }

    #[test]
    fn starts_are_monotone(
        calendar in any_calendar(),
        a in 0..=Timestamp::MAX.as_unix_millis(),
        b in 0..=Timestamp::MAX.as_unix_millis(),
    ) {
        let (early, late) = (at(a.min(b)), at(a.max(b)));
        prop_assert!(calendar.span_at(early).start <= calendar.span_at(late).start);
    }
}

/// The names are those of the HTTP API, which clients keep.
#[test]
fn a_window_is_written_and_read() {
    let every = Window::Every(Duration::from_millis(90_500));
    let windows = NAMES.map(|(_, window)| window).into_iter().chain([every]);
    let named = "lifetime minute hour day month year";
    let names: Vec<_> = named.split(' ').chain(["every 90500ms"]).collect();
    assert!(windows.clone().map(|window| window.to_string()).eq(names.iter().copied()));
    for (window, name) in windows.zip(names) {
        assert_eq!(name.parse(), Ok(window));
    }
    for text in ["", "Day", "day ", "every", "every ms", "every +5ms", "every 5s", "every 1.5ms"] {
        assert_eq!(text.parse::<Window>(), Err(ParseWindowError(())), "{text:?}");
    }
    let too_long = format!("every {}0ms", u64::MAX);
    assert!(too_long.parse::<Window>().is_err());
}
