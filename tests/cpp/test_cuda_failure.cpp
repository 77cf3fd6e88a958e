// What a launch's report becomes: status, and a text that names rank, phase, epoch and numbers.
#include "cuda/engine/failure.h"
#include "support.h"

namespace flashmoe::test {
namespace {

using cuda::ReportPlace;
using cuda::sync::LaunchReports;
using cuda::sync::PeerReport;
using cuda::sync::WaitReport;
using cuda::sync::WaitTag;

constexpr ReportPlace kPlace{.device = 3, .rank = 1, .world = 4, .timeout_seconds = 2.5};

WaitReport report_of(WaitTag tag, uint32_t block, uint32_t expected, PeerReport peer = {}) {
  WaitReport report{};
  report.tag = static_cast<uint32_t>(tag);
  report.block_idx = block;
  report.expected = expected;
  report.peer = peer;
  return report;
}

void expect_failure(const WaitReport& report, fm_status status,
                    std::initializer_list<const char*> words) {
  const Error error = cuda::error_of({.failure = report, .notice = {}}, kPlace);
  expect_error({error.status(), error.what()}, status, words);
}

TEST(Failure, AWaitForAPeerNamesBothRanksPhaseEpochExpectedAndSeen) {
  const PeerReport peer{2, 77, 76};
  expect_failure(report_of(WaitTag::kMetadata, 0, 77, peer), FM_TIMEOUT,
                 {"device 3", "rank 1 waited 2.5 s", "phase plan", "metadata", "rank 2", "epoch 77",
                  "expected 77", "seen 76", "FLASHMOE_TIMEOUT_S"});
  expect_failure(report_of(WaitTag::kPushed, 5, 77, peer), FM_TIMEOUT, {"phase push", "rank 2"});
  expect_failure(report_of(WaitTag::kReturned, 5, 77, peer), FM_TIMEOUT,
                 {"phase combine", "rank 2"});
  expect_failure(report_of(WaitTag::kSlotGrads, 5, 77, peer), FM_TIMEOUT,
                 {"phase weights of slots", "gradients of slots", "rank 2"});
}

TEST(Failure, AWaitInsideARankNamesTheBlock) {
  expect_failure(
      report_of(WaitTag::kUpDone, 9, 4), FM_TIMEOUT,
      {"a wait ran out of time: hidden rows of a block (block 9, thread 0", "expected 4"});
}

TEST(Failure, AMismatchNamesTheFieldAndTheRanks) {
  const auto field = static_cast<uint32_t>(cuda::config::RankField::kTopK);
  expect_failure(report_of(WaitTag::kMismatch, field, 0, {2, 9, 0}), FM_MISMATCH,
                 {"top_k differs between ranks", "rank 2", "rank 1", "epoch 9"});
}

TEST(Failure, EveryFieldHasAName) {
  for (int field = 0; field < static_cast<int>(cuda::config::RankField::kCount); ++field) {
    EXPECT_STRNE(cuda::name_of(static_cast<cuda::config::RankField>(field)), "a field") << field;
  }
}

TEST(Failure, TooManyRowsSayHowMany) {
  expect_failure(report_of(WaitTag::kTooManyRows, 0, 5000, {1, 9, 4096}), FM_OUT_OF_MEMORY,
                 {"5000 rows came to rank 1", "4096", "max_tokens * top_k is 2500"});
}

TEST(Failure, AnAbortNamesWhoStoppedTheGroup) {
  expect_failure(report_of(WaitTag::kAborted, 0, 4), FM_ABORTED,
                 {"aborted by rank 3", "make a new group"});
}

TEST(Failure, RoutingIsTheTokensMatter) {
  expect_failure(report_of(WaitTag::kUndefinedLogits, 37, 0), FM_ROUTING,
                 {"router logits", "token 37"});
  expect_failure(report_of(WaitTag::kInvalidId, 21, 0), FM_ROUTING,
                 {"topk_ids", "expert id below -1", "token 21"});
  expect_failure(report_of(WaitTag::kUndefinedBias, 11, 0), FM_ROUTING, {"expert 11"});
}

// A token without a routing is told beside what ended the launch, and does not hide it.
TEST(Failure, BothAreToldAndTheFailureWins) {
  LaunchReports reports{.failure = report_of(WaitTag::kAborted, 0, 4),
                        .notice = report_of(WaitTag::kUndefinedLogits, 37, 0)};
  const Error both = cuda::error_of(reports, kPlace);
  expect_error({both.status(), both.what()}, FM_ABORTED,
               {"device 3", "aborted by rank 3", "and before that", "token 37"});
  reports.failure = {};
  const Error notice = cuda::error_of(reports, kPlace);
  expect_error({notice.status(), notice.what()}, FM_ROUTING, {"device 3", "token 37"});
  EXPECT_EQ(std::string(notice.what()).find("before that"), std::string::npos);
}

}  // namespace
}  // namespace flashmoe::test
