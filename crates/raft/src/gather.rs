//! Taking what belongs together from a queue.

use tokio::sync::mpsc::Receiver;

/// Waits until something is in `queue` and moves all of it to `batch`, which then holds `most` items at most. Gives
/// their number: zero once the queue is closed and empty.
///
/// What arrives in one turn of the runtime should travel together, but the task that takes it is often woken by the
/// first item, before the tasks that bring the others have run. So it lets those go first: one turn, no waiting.
pub(crate) async fn gather<T>(queue: &mut Receiver<T>, batch: &mut Vec<T>, most: usize) -> usize {
    if queue.recv_many(batch, most).await > 0 {
        tokio::task::yield_now().await;
        while batch.len() < most
            && let Ok(item) = queue.try_recv()
        {
            batch.push(item);
        }
    }
    batch.len()
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_the_tasks_that_are_ready_bring_comes_along() {
        // In a task of the one worker, so that none of the others runs before this one waits.
        let gathered = tokio::spawn(async {
            let (items, mut queue) = mpsc::channel(10);
            let taker = tokio::spawn(async move {
                let mut batch = Vec::new();
                gather(&mut queue, &mut batch, 10).await
            });
            for number in 0..5 {
                let items = items.clone();
                tokio::spawn(async move { items.send(number).await });
            }
            taker.await.unwrap()
        });
        assert_eq!(gathered.await.unwrap(), 5);
    }

    #[tokio::test]
    async fn no_more_than_may_be_and_nothing_is_lost() {
        let (items, mut queue) = mpsc::channel(10);
        for number in 0..5 {
            items.send(number).await.unwrap();
        }
        drop(items);
        let mut taken = Vec::new();
        let mut sizes = Vec::new();
        loop {
            let mut batch = Vec::new();
            sizes.push(gather(&mut queue, &mut batch, 3).await);
            if batch.is_empty() {
                break;
            }
            taken.extend(batch);
        }
        assert_eq!((taken, sizes), (vec![0, 1, 2, 3, 4], vec![3, 2, 0]));
    }
}
