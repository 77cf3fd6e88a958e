// The one exception type of the core. It carries the fm_status that the C ABI returns and a text
// with the operands and what to do.
#pragma once

#include <exception>
#include <sstream>
#include <string>
#include <utility>

#include "flashmoe/c_api.h"

namespace flashmoe {

class Error : public std::exception {
 public:
  Error(fm_status status, std::string text) : status_(status), text_(std::move(text)) {}
  fm_status status() const { return status_; }
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  fm_status status_;
  std::string text_;
};

// fail(FM_INVALID_VALUE, "x: hidden size ", given, ", expected ", expected)
template <class... Parts>
[[noreturn]] void fail(fm_status status, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(status, text.str());
}

}  // namespace flashmoe
