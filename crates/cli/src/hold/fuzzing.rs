//! The line protocol, as [`crate::fuzzing`] offers it.

use super::wire::{MAX_LINE, News, Order};

/// A line in either direction.
pub(crate) fn line(text: &str) {
    if let Ok(order) = text.parse::<Order>() {
        let again = order.to_string();
        assert!(again.len() < MAX_LINE);
        assert_eq!(again.parse(), Ok(order));
    }
    if let Ok(news) = text.parse::<News>() {
        let again = news.to_string();
        assert!(again.len() < MAX_LINE);
        assert_eq!(again.parse(), Ok(news));
    }
}
