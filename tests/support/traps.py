"""Every trap of the fact sheet on ELEVATER (its sections 0 and 5), and the test that keeps us out of it."""

from typing import NamedTuple


class Trap(NamedTuple):
    """One way in which others went wrong."""

    place: str
    """Section of the sheet, and the number or the paragraph in it."""
    what: str
    test: str
    """Name of the test function; it says what the trap is."""


# fmt: off
TRAPS = (
    # Section 0: the ten facts
    Trap("0.1", "the official download host is dead", "test_trap_the_official_host_is_dead_and_never_contacted"),
    Trap("0.2", "14 accuracies, 4 mean-per-class, 11-point mAP, ROC AUC",
         "test_trap_fourteen_accuracies_four_mean_per_class_one_map_one_auc"),
    Trap("0.2", "ImageNet-1K is beside the mean", "test_trap_imagenet_stands_beside_the_score"),
    Trap("0.3", "class order differs between sources", "test_trap_class_order_differs_so_names_are_joined_by_name"),
    Trap("0.4", "VOC: softmax and 11 points, or cosine and full AP",
         "test_trap_voc2007_is_ranked_by_the_softmax_not_by_the_cosine"),
    Trap("0.5", "voc2007 of the mirrors is object crops", "test_trap_voc2007_crops_are_not_voc_classification"),
    Trap("0.6", "five mirrors have other test images",
         "test_trap_five_mirrors_hold_other_test_images_and_the_result_says_which"),
    Trap("0.6", "PatchCamelyon and RESISC45 have other prompts there",
         "test_trap_pcam_and_resisc45_have_other_prompts_in_the_mirror"),
    Trap("0.7", "Hateful Memes has no mirror", "test_trap_hateful_memes_has_no_mirror_and_says_how_to_get_it"),
    Trap("0.8", "the linear probe chooses its epoch on the test set", "test_trap_probe_never_selects_on_test"),
    Trap("0.9", "import needs an undeclared package", "test_trap_undeclared_packages_at_import"),
    Trap("0.9", "fewer shards than workers", "test_trap_fewer_shards_than_workers"),
    Trap("0.10", "no interval on any number or on the mean",
         "test_trap_sampling_noise_of_the_mean_of_20_is_a_third_of_a_point_and_of_kitti_over_three"),
    # Section 5.2: CLIP_benchmark, from reading and trying
    Trap("5.2 amp", "mixed precision by default", "test_trap_mixed_precision_is_off_unless_asked_for_and_recorded"),
    Trap("5.2 amp", "the batch size moves numbers", "test_trap_batch_size_moves_no_number"),
    Trap("5.2 probe", "CUDA alone", "test_trap_probe_runs_on_cpu"),
    Trap("5.2 probe", "no multi-label", "test_trap_multi_label_probe"),
    Trap("5.2 probe", "a class with fewer than k images ends it in silence",
         "test_trap_class_with_fewer_than_k_images"),
    Trap("5.2 probe", "a grid of strengths that diverges", "test_trap_no_strength_of_the_grid_diverges"),
    Trap("5.2 probe", "train and val ignore custom prompts", "test_trap_train_and_val_have_the_prompts_of_test"),
    Trap("5.2 cache", "keyed by names: stale features", "test_trap_feature_cache_keyed_by_a_name_gives_stale_features"),
    Trap("5.2 cache", "no val split in the cache leads to a missing file", "test_trap_each_split_has_its_own_features"),
    Trap("5.2 flags", "a truth value parsed from text cannot be switched off", "test_trap_flags_can_be_switched_off"),
    Trap("5.2 speed", "one text forward per class", "test_trap_one_text_forward_per_class"),
    Trap("5.2 speed", "all logits are kept", "test_trap_all_logits_are_kept"),
    Trap("5.2 speed", "retrieval builds the full score matrix", "test_trap_retrieval_builds_the_full_score_matrix"),
    Trap("5.2 result", "no intervals, sizes, versions, timings, hashes",
         "test_trap_a_result_without_intervals_sizes_versions_timings_or_hashes"),
    Trap("5.2 result", "no saved predictions", "test_trap_no_predictions_are_kept"),
    # Section 5.2: from issues and pull requests
    Trap("5.2 prompts", "a folder's prompts overwritten by defaults (#109)",
         "test_trap_prompts_of_a_folder_are_not_overwritten"),
    Trap("5.2 prompts", "KITTI in the wrong order (#21)",
         "test_trap_kitti_prompts_in_a_wrong_order_are_joined_by_name"),
    Trap("5.2 prompts", "ImageNet's equal names (#124)",
         "test_trap_imagenet_has_two_pairs_of_equal_names_and_one_of_each_can_never_win"),
    Trap("5.2 prompts", "a class line is missing (LOVM #3)", "test_trap_a_missing_class_line_is_refused"),
    Trap("5.2 download", "split names (#104)", "test_trap_split_names"),
    Trap("5.2 download", "path joins of Windows (evalscope #619)", "test_trap_windows_path_joins"),
    Trap("5.2 download", "no val split on the hub (evalscope #741)", "test_trap_mirrors_without_val"),
    Trap("5.2 request", "evaluation in training is too slow (open_clip #137)",
         "test_trap_evaluation_in_training_has_a_fixed_budget"),
    # Section 5.3: the ELEVATER toolkit
    Trap("5.3", "NLTK downloads at import", "test_trap_undeclared_packages_at_import"),
    Trap("5.3", "a model's name is evaluated as code", "test_trap_a_model_name_is_never_evaluated"),
    Trap("5.3", "checkpoints are loaded non-strictly", "test_trap_partial_checkpoint_is_refused"),
    Trap("5.3", "the final run differs from the sweep (#3)", "test_trap_the_final_fit_is_that_of_the_choice"),
    Trap("5.3", "validation is the first images of each class", "test_trap_validation_is_random_not_the_first_images"),
    Trap("5.3", "the official val split is loaded and never used",
         "test_trap_the_official_val_split_is_loaded_and_never_used"),
    Trap("5.3", "a failed run counts as a score of zero", "test_trap_a_failed_task_is_no_score_of_zero"),
    Trap("5.3", "a single GPU", "test_trap_ranks_give_the_numbers_of_one_process"),
    Trap("5.3", "custom data has no multi-label", "test_trap_a_folder_of_ones_own_may_have_several_labels"),
)
# fmt: on
