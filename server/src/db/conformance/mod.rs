//! What every database behind [`Db`](super::Db) has to do, run on each engine against real files or a real server.

/// Runs each of the named functions on each engine.
macro_rules! on_each_engine {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test] pub(super) async fn $name() { super::$name(super::Bench::new().await).await; })*
        }
        mod postgres {
            $(#[test] fn $name() { crate::db::testing::on_postgres(super::sqlite::$name); })*
        }
    };
}

mod devices;
mod releases;
mod transactions;
