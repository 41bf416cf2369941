"""The tests for each class of advisories that LLM servers have had (vLLM, SGLang, llama.cpp, LiteLLM, TGI).

A class whose tests were renamed or removed fails here, so it cannot lose them unnoticed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.security.bodies import ALL
from tests.server.all_routes import all_routes

from quire.config import EngineConfig, LoRAConfig, ServerConfig
from quire.server.app import build_app
from quire.server.state import ServerState

TESTS = Path(__file__).resolve().parents[1]

CLASSES: dict[str, tuple[str, ...]] = {
    "deserialisation: pickle, dill, marshal": (
        "scripts/test_check_source.py::test_forbidden",
        "scripts/test_check_source.py::test_the_package_keeps_the_rules",
        "security/test_deserialisation.py::test_no_process_unpickles",
        "weights/test_safetensors.py::test_pickles_are_not_an_alternative",
        "kvtransfer/test_fuzz.py::test_a_stranger_may_say_anything",
        "distributed/test_hello.py::test_garbage_changes_nothing",
    ),
    "bind addresses": (
        "security/test_source.py::test_only_the_api_listens_beyond_this_machine_by_default",
        "server/test_exposure.py::test_beyond_it_the_address_the_risk_and_both_remedies_are_named",
        "server/test_admin_listener.py::test_beyond_this_machine_it_needs_a_key",
        "kvtransfer/test_peers.py::test_beyond_this_machine_a_key_is_needed",
        "distributed/test_hello.py::test_an_address_that_others_reach_needs_a_key",
        "kvtransfer/test_fuzz.py::test_a_socket_is_in_a_private_place",
    ),
    "slow readers": (
        "security/test_slow_readers.py::test_others_are_served_beside_one_who_does_not_read",
        "engine/test_kv_events.py::test_a_full_queue_drops_a_batch_leaves_a_gap_and_is_mended",
        "distributed/test_links.py::test_a_peer_that_does_not_read_delays_no_other",
        "kvtransfer/test_fuzz.py::test_the_silent_and_the_stuck_are_closed",
    ),
    "clients name no internal handle": (
        "security/test_requests_name_nothing_inside.py::test_no_tensors_and_no_arguments_for_loaders",
        "kvtransfer/test_export.py::test_no_text_is_a_ticket",
        "kvtransfer/test_peers.py::test_a_client_never_chooses_who_is_connected_to",
        "server/test_kv_transfer.py::test_a_foreign_host_is_ignored_with_a_warning",
    ),
    "no tensor inputs": (
        "security/test_requests_name_nothing_inside.py::test_no_tensors_and_no_arguments_for_loaders",
        "weights/test_safetensors_header.py::test_headers_that_cannot_be",
    ),
    "no code from a model's directory": (
        "weights/test_resolve.py::test_the_patterns_leave_out_code_pickles_and_second_copies",
        "security/test_source.py::test_code_is_imported_from_tables_of_our_own_only",
        "security/test_model_code.py::test_code_beside_a_model_is_not_run",
    ),
    "no arguments passed through to a loader": (
        "security/test_requests_name_nothing_inside.py::test_no_tensors_and_no_arguments_for_loaders",
        "text/test_chat_template.py::test_chat_template_kwargs_are_bounded",
    ),
    "assert is no check": (
        "security/test_source.py::test_no_assert_guards_input",
        "security/test_source.py::test_narrowing_is_told_from_checking",
    ),
    "the revision applies to everything": (
        "weights/test_resolve.py::test_download_asks_for_data_only_and_logs_the_commit",
        "weights/test_resolve.py::test_a_tokenizer_is_downloaded_without_weights",
        "security/test_source.py::test_only_these_modules_connect",
    ),
    "dependencies": (
        "scripts/test_audit.py::test_ranges",
        "scripts/test_audit.py::test_without_pip_audit_it_is_not_checked",
        "scripts/test_sbom.py::test_required_fields",
    ),
    "eval of what a model says": (
        "scripts/test_check_source.py::test_forbidden",
        "text/parsing/test_parsers.py::test_any_text_in_any_cutting",
        "text/parsing/test_parsers.py::test_what_is_no_call_is_text",
    ),
    "templates in a sandbox": (
        "text/test_chat_template.py::test_templates_cannot_reach_python",
        "text/test_chat_template.py::test_templates_cannot_change_the_callers_messages",
        "security/test_templates.py::test_no_route_takes_a_template",
    ),
    "templates with fuel and a limit of output, on every route": (
        "security/test_templates.py::test_fuel_and_output_are_limited_on_every_route",
        "text/test_chat_template.py::test_bombs_end_in_a_typed_error",
        "text/test_chat_template.py::test_bombs_end_in_jinja2_too",
        "text/test_chat_template.py::test_output_ends_at_its_limit_and_not_after_it",
    ),
    "texts of exceptions": (
        "security/test_what_answers_say.py::test_no_route_echoes_the_text_of_an_exception",
        "server/test_errors.py::test_failures_say_the_request_id_and_nothing_else",
    ),
    "the Host header does not choose the path": (
        "server/test_middleware.py::test_host_header_cannot_open_a_path",
        "server/test_middleware.py::test_forwarded_headers_cannot_open_a_path",
        "server/test_live.py::test_host_header_over_the_wire",
    ),
    "every route wants the key, except a list": (
        "server/test_middleware.py::test_every_registered_route_is_guarded_or_listed",
        "server/test_middleware.py::test_everything_else_does",
        "server/test_admin_listener.py::test_every_path_of_the_admin_listener_wants_its_key",
        "server/test_admin_listener.py::test_without_a_listener_the_admin_key_guards_the_same_routes",
        "server/test_admin_listener.py::test_a_web_page_may_not_use_it",
    ),
    "keys are compared by digest": (
        "security/test_keys.py::test_keys_are_looked_up_by_digest",
        "security/test_keys.py::test_no_key_is_compared_with_equals",
    ),
    "the prefix cache is a tenant's own": (
        "server/test_keys.py::test_a_request_gets_its_tenants_place",
        "engine/test_async_llm.py::test_salts_keep_tenants_apart",
        "kvcache/test_kvcache.py::test_salts_share_nothing",
        "engine/test_moved_kv.py::test_a_salt_keeps_kv_apart_in_stores_too",
    ),
    "nothing of one request reaches another": (
        "engine/test_compose.py::test_any_mix_of_parameters_gives_each_request_its_own_answer",
        "sampling/test_sampler.py::test_a_seat_is_sampled_as_its_present_request_wants",
        "sampling/test_sampler.py::test_only_rows_that_ask_are_edited_and_told",
        "server/test_responses_api.py::test_another_keys_response_is_unknown",
    ),
    "X-Request-Id is no internal id": (
        "server/test_middleware.py::test_request_id_is_echoed",
        "server/test_middleware.py::test_same_request_id_twice_is_two_requests",
        "server/test_middleware.py::test_odd_request_ids_are_replaced",
    ),
    "one request ends the engine": (
        "security/test_one_request_kills.py::test_every_field_with_every_kind_of_value",
        "security/test_one_request_kills.py::test_depth_of_json_is_bounded",
        "conformance/test_http_fuzz.py::test_a_stream_is_the_whole_whatever_is_asked_for",
        "conformance/test_openapi_fuzz.py::test_no_damaged_body_makes_a_5xx",
        "engine/test_async_llm.py::test_a_bad_request_is_refused_and_others_go_on",
        "sampling/test_sampler.py::test_nan_is_that_rows_error_alone",
    ),
    "unbounded": (
        "security/test_bounds.py::test_every_list_of_every_route_is_bounded",
        "security/test_bounds.py::test_every_route_has_the_same_limit_of_a_body",
        "security/test_bounds.py::test_prompts_times_n_are_the_sequences_that_count",
        "security/test_limits.py::test_the_answer_is_the_codes",
        "server/test_middleware.py::test_unannounced_body_is_cut_off_as_it_arrives",
        "server/test_live.py::test_endless_headers_are_cut_off",
        "server/test_responses_api.py::test_the_store_is_bounded",
        "structured/test_store.py::test_the_least_recently_used_go_when_the_cap_is_reached",
    ),
    "expressions and grammars that take for ever": (
        "security/test_source.py::test_no_new_regular_expression_on_requests_or_what_models_say",
        "security/test_source.py::test_the_expression_for_billing_headers_does_not_backtrack",
        "structured/test_store.py::test_a_bomb_is_remembered_and_does_not_hold_up_others",
        "text/test_stop_strings.py::test_time_is_linear_for_adversarial_stop_strings",
        "text/test_detokenizer.py::test_junk_costs_linear_time",
        "text/parsing/test_parsers.py::test_work_is_linear_and_little_is_held",
    ),
    "nested grammars": (
        "structured/test_store.py::test_deep_grammars_do_not_overflow_the_stack",
        "structured/test_schema.py::test_hostile_and_malformed_schemas_are_refused",
    ),
    "no address of a client's is fetched": (
        "security/test_requests_name_nothing_inside.py::test_no_url_is_fetched",
        "security/test_source.py::test_only_these_modules_connect",
    ),
    "no file of a client's naming": (
        "security/test_requests_name_nothing_inside.py::test_a_models_name_is_no_path",
        "security/test_requests_name_nothing_inside.py::test_ids_of_responses_are_no_paths",
        "server/test_adapters.py::test_names_that_are_not_there",
        "weights/test_safetensors.py::test_index_may_not_leave_the_directory",
    ),
    "transfers have an owner": (
        "kvtransfer/test_export.py::test_a_ticket_has_one_reader",
        "kvtransfer/test_export.py::test_a_thousand_leases_end_and_leave_no_memory",
        "kvtransfer/test_killed.py::test_a_killed_reader_leaves_no_memory",
    ),
    "files with numbers that overflow": (
        "weights/test_gguf_header.py::test_a_hostile_file_is_an_error",
        "weights/test_gguf_header.py::test_changed_numbers",
        "weights/test_safetensors_header.py::test_a_length_beyond_the_file_is_not_read",
    ),
    "native kernels take indices that were checked": (
        "security/test_one_request_kills.py::test_token_ids_outside_the_vocabulary_are_refused",
        "kernels/test_attention.py::test_wild_indices_are_refused_before_anything_is_read",
        "kernels/test_kv_cache.py::test_wild_positions_and_slots_are_refused_before_anything_is_written",
        "kernels/test_linear_cpu.py::test_invalid_rows_are_refused_before_anything_is_read",
    ),
    "logs cannot be forged": (
        "util/test_logging.py::test_what_a_client_sent_cannot_forge_a_line_or_move_the_cursor",
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_tests_that_exist(name):
    for test in CLASSES[name]:
        path, _, function = test.partition("::")
        source = (TESTS / path).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {function}\(", source, re.M), test


def test_every_test_of_this_folder_stands_for_a_class():
    named = {test for tests in CLASSES.values() for test in tests}
    files = {test.partition("::")[0] for test in named}
    here = {f"security/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert here - files == {"security/test_classes.py"}


def test_the_table_of_bodies_has_every_route_that_reads_one():
    config = ServerConfig(enable_admin_endpoints=True, enable_tokenizer_info_endpoint=True)
    state = ServerState(config, EngineConfig(lora=LoRAConfig(enable_lora=True)))
    without_a_body = {
        "/ping",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/v1/responses/{response_id}/cancel",
    }
    posts = {
        route.path for route in all_routes(build_app(state)) if "POST" in (route.methods or ())
    }
    assert posts == ALL.keys() | without_a_body
