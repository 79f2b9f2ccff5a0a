use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn the_store_is_what_the_model_is(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        model::run(&bytes);
    }
}
