//! What every database behind [`Db`](super::Db) has to do, run on each engine against real files or a real server.

/// Runs each of the named functions on each engine.
macro_rules! on_each_engine {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(super::Bench::sqlite().await).await; })*
        }
    };
}

mod devices;
mod releases;
mod transactions;
